//! The library behind the program: synthesis, store, control.
pub mod fetch;
pub mod serve;
