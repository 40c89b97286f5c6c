//! One VM in one process.
