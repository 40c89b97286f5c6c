//! Whole machines with hand-assembled guests. These need nothing but `/dev/kvm`.

mod common;
mod confined;
mod exits;
mod hints;
mod pause;
mod snapshot;
mod topology;
