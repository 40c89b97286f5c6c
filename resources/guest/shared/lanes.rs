//! Four numbers at a time, by SSE, which every x86-64 processor has. Only operations whose results are
//! exact to the last bit on every processor: a machine that moves computes the same afterwards.

use core::arch::x86_64::*;
use core::ops::{Add, AddAssign, Mul, Sub};

/// Numbers in a `Lanes`.
pub const LANES: usize = 4;

/// Four numbers.
#[derive(Clone, Copy)]
pub struct Lanes(__m128);

// SAFETY of all blocks in this file: the intrinsics need SSE, which the target always enables; loads
// and stores go through arrays of four.
impl Lanes {
    /// The same number four times.
    #[inline(always)]
    pub fn all(x: f32) -> Lanes {
        // SAFETY: see above.
        Lanes(unsafe { _mm_set1_ps(x) })
    }

    /// The four numbers from `at` on.
    #[inline(always)]
    pub fn load(from: &[f32], at: usize) -> Lanes {
        let four = &from[at..at + LANES];
        // SAFETY: see above; the slice has four numbers.
        Lanes(unsafe { _mm_loadu_ps(four.as_ptr()) })
    }

    /// Puts them to `at` and after.
    #[inline(always)]
    pub fn store(self, to: &mut [f32], at: usize) {
        let four = &mut to[at..at + LANES];
        // SAFETY: see above; the slice has four numbers.
        unsafe { _mm_storeu_ps(four.as_mut_ptr(), self.0) }
    }

    /// The first `count` lanes; 0 in the others.
    #[inline(always)]
    pub fn first(self, count: usize) -> Lanes {
        const MASKS: [u32; 8] = [u32::MAX, u32::MAX, u32::MAX, u32::MAX, 0, 0, 0, 0];
        let four = &MASKS[LANES - count.min(LANES)..][..LANES];
        // SAFETY: see above; the slice has four numbers.
        Lanes(unsafe { _mm_and_ps(self.0, _mm_loadu_ps(four.as_ptr().cast())) })
    }

    /// The larger of each two.
    #[inline(always)]
    pub fn max(self, other: Lanes) -> Lanes {
        // SAFETY: see above.
        Lanes(unsafe { _mm_max_ps(self.0, other.0) })
    }

    /// Square roots.
    #[inline(always)]
    pub fn sqrt(self) -> Lanes {
        // SAFETY: see above.
        Lanes(unsafe { _mm_sqrt_ps(self.0) })
    }

    /// Quotients.
    #[inline(always)]
    pub fn over(self, other: Lanes) -> Lanes {
        // SAFETY: see above.
        Lanes(unsafe { _mm_div_ps(self.0, other.0) })
    }

    /// The sum of the four, always added in the same order.
    #[inline(always)]
    pub fn sum(self) -> f32 {
        let mut four = [0.0; LANES];
        self.store(&mut four, 0);
        (four[0] + four[1]) + (four[2] + four[3])
    }
}

impl Add for Lanes {
    type Output = Lanes;
    #[inline(always)]
    fn add(self, other: Lanes) -> Lanes {
        // SAFETY: see above.
        Lanes(unsafe { _mm_add_ps(self.0, other.0) })
    }
}

impl AddAssign for Lanes {
    #[inline(always)]
    fn add_assign(&mut self, other: Lanes) {
        *self = *self + other;
    }
}

impl Sub for Lanes {
    type Output = Lanes;
    #[inline(always)]
    fn sub(self, other: Lanes) -> Lanes {
        // SAFETY: see above.
        Lanes(unsafe { _mm_sub_ps(self.0, other.0) })
    }
}

impl Mul for Lanes {
    type Output = Lanes;
    #[inline(always)]
    fn mul(self, other: Lanes) -> Lanes {
        // SAFETY: see above.
        Lanes(unsafe { _mm_mul_ps(self.0, other.0) })
    }
}
