//! Harness for end-to-end suites and benches.
