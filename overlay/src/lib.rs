//! Bases and deltas of VM state as pure bytes.
