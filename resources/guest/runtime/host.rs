//! The services that applications get from the runtime (abi.rs), and the state behind them.

use alloc::vec::Vec;
use core::cell::UnsafeCell;

use shared::abi::{Bytes, Region, Services};

use crate::console::Console;
use crate::irq::Clock;
use crate::rng::Rng;
use crate::{cpu, say};

struct Shared(UnsafeCell<Option<State>>);

struct State {
    clock: Clock,
    rng: Option<Rng>,
}

// SAFETY: the guest has one thread; interrupt handlers (boot.s) do not come here.
unsafe impl Sync for Shared {}

static STATE: Shared = Shared(UnsafeCell::new(None));

fn state() -> &'static mut State {
    // SAFETY: one thread; each function below uses the reference for one expression and calls nothing
    // that comes back here.
    let state = unsafe { &mut *STATE.0.get() };
    state.as_mut().expect("set up at boot")
}

/// To be called once, at boot.
pub fn set_up(clock: Clock, rng: Option<Rng>) {
    // SAFETY: one thread, before any other use.
    unsafe { *STATE.0.get() = Some(State { clock, rng }) };
}

/// Nanoseconds since boot.
pub fn now() -> u64 {
    state().clock.now()
}

/// A random number.
pub fn random_word() -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: the bytes are the function's for the call.
    unsafe { random(bytes.as_mut_ptr(), bytes.len()) };
    u64::from_le_bytes(bytes)
}

/// Sets the distance of ticks.
pub fn set_tick(nanoseconds: u64) {
    state().clock.set_tick(nanoseconds);
}

/// The services, without memory yet.
pub const fn services() -> Services {
    const NONE: Region = Region { start: 0, end: 0 };
    Services {
        log,
        fail,
        now: now_for_app,
        random,
        memory: [NONE; 2],
    }
}

unsafe extern "C" fn log(line: Bytes) {
    // SAFETY: the application's bytes live during the call.
    let bytes = unsafe { line.get() };
    let mut whole = Vec::with_capacity(bytes.len() + 1);
    whole.extend_from_slice(bytes);
    whole.push(b'\n');
    Console.bytes(&whole);
}

unsafe extern "C" fn fail(line: Bytes) -> ! {
    // SAFETY: the application's bytes live during the call.
    let bytes = unsafe { line.get() };
    say!(
        "cloudlet-guest: application: {}",
        core::str::from_utf8(bytes).unwrap_or("?")
    );
    cpu::reset()
}

unsafe extern "C" fn now_for_app() -> u64 {
    now()
}

/// From the host where it gives us any; else made from the clock, which is good for a simulation's
/// seed and said so at boot.
unsafe extern "C" fn random(out: *mut u8, len: usize) {
    // SAFETY: the application lends `len` bytes.
    let out = unsafe { core::slice::from_raw_parts_mut(out, len) };
    match &mut state().rng {
        Some(rng) => rng.fill(out),
        None => {
            let mut word = state().clock.now() | 1;
            for byte in out {
                word ^= word << 13;
                word ^= word >> 7;
                word ^= word << 17;
                *byte = (word >> 32) as u8;
            }
        }
    }
}
