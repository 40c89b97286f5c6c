//! The applications' own code, run on the host: the guest's modules are included as they are.
#![allow(
    unreachable_pub,
    reason = "the guest's modules are included as they are"
)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]
#![allow(
    clippy::cast_precision_loss,
    reason = "guest code; build.rs holds it to other lints"
)]

extern crate alloc;

#[path = "../../guest/object/descriptor.rs"]
mod descriptor;
#[path = "../../guest/object/index.rs"]
mod index;
#[path = "../../guest/shared/lanes.rs"]
mod lanes;
#[path = "../../guest/shared/math.rs"]
mod math;
#[path = "../../guest/object/recogniser.rs"]
mod recogniser;
#[path = "../../guest/fluid/render.rs"]
mod render;
#[path = "../../guest/fluid/sim.rs"]
mod sim;
#[path = "../../guest/fluid/tanks.rs"]
mod tanks;
#[path = "../../guest/shared/words.rs"]
mod words;

mod fluid;
mod object;

use cloudlet_resources::hash;
