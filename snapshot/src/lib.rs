//! The container of machine state and files that appear whole or not at all.
