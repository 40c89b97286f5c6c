//! The library behind the program: synthesis, store, control.
