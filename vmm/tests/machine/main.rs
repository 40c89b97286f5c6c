//! Whole machines with hand-assembled guests. These need nothing but `/dev/kvm`.

mod common;
mod exits;
mod snapshot;
mod topology;
