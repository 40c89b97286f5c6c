//! From a picture of 8x8 pixels to a descriptor: the picture, moved a little if asked to, is drawn at
//! twice its size, and described by its slopes (how much of each of 8 directions in each of 4x4 cells)
//! and by its own pixels. A descriptor is `DIMS` signed bytes of one length, so that a sum of products
//! says how alike two are.

use core::f32::consts::FRAC_1_SQRT_2 as HALF;

use crate::lanes::{LANES, Lanes};
use crate::math::sqrt;

/// Pixels of a picture; values are 0 to 16.
pub const PIXELS: usize = 64;
/// Numbers of a descriptor.
pub const DIMS: usize = 192;
/// Length of every descriptor's first part, and of its second.
const SLOPES_LENGTH: f32 = 280.0;
const PIXELS_LENGTH: f32 = 280.0;
/// About the sum of products of a descriptor with itself.
pub const ALIKE: f32 = SLOPES_LENGTH * SLOPES_LENGTH + PIXELS_LENGTH * PIXELS_LENGTH;

const SIDE: usize = 16;
/// The picture with a border, so that it can be sampled outside.
const PADDED: usize = 14;
const BORDER: f32 = 3.0;
const DIRECTIONS: [(f32, f32); 8] = [
    (1.0, 0.0),
    (HALF, HALF),
    (0.0, 1.0),
    (-HALF, HALF),
    (-1.0, 0.0),
    (-HALF, -HALF),
    (0.0, -1.0),
    (HALF, -HALF),
];

/// How a picture is moved before it is described.
#[derive(Clone, Copy)]
pub struct Move {
    /// Radians.
    pub turn: f32,
    pub scale_x: f32,
    pub scale_y: f32,
    /// Pixels.
    pub shift_x: f32,
    pub shift_y: f32,
}

impl Move {
    /// Leaves the picture as it is.
    pub const NONE: Move = Move {
        turn: 0.0,
        scale_x: 1.0,
        scale_y: 1.0,
        shift_x: 0.0,
        shift_y: 0.0,
    };
}

/// A picture with its border.
pub struct Picture([f32; PADDED * PADDED]);

impl Picture {
    /// From `PIXELS` bytes; none if there are not so many or one is over 16.
    pub fn new(pixels: &[u8]) -> Option<Picture> {
        if pixels.len() != PIXELS || pixels.iter().any(|&p| p > 16) {
            return None;
        }
        let mut padded = [0.0; PADDED * PADDED];
        for (i, &p) in pixels.iter().enumerate() {
            padded[(i / 8 + BORDER as usize) * PADDED + i % 8 + BORDER as usize] = f32::from(p);
        }
        Some(Picture(padded))
    }

    /// Draws the picture, moved, at twice its size.
    fn draw(&self, m: Move) -> [f32; SIDE * SIDE] {
        // Added to a number from 0 to 2^22, this leaves its nearest integer in the low bits.
        const FLOOR: f32 = 8_388_608.0;
        let (sin, cos) = sin_cos(m.turn);
        let mut out = [0.0; SIDE * SIDE];
        let limit = PADDED as f32 - 1.001;
        for (row, line) in out.chunks_exact_mut(SIDE).enumerate() {
            let v = (row as f32 - 7.5) * 0.5;
            let (mut at, mut fx, mut fy) = ([0u32; SIDE], [0.0f32; SIDE], [0.0f32; SIDE]);
            for column in 0..SIDE {
                let u = (column as i32 as f32 - 7.5) * 0.5;
                let x = (cos * u - sin * v) * m.scale_x + m.shift_x + 3.5 + BORDER;
                let y = (sin * u + cos * v) * m.scale_y + m.shift_y + 3.5 + BORDER;
                let (x, y) = (x.max(0.5).min(limit), y.max(0.5).min(limit));
                let (left, top) = (x - 0.5 + FLOOR, y - 0.5 + FLOOR);
                at[column] = (top.to_bits() & 0xff) * PADDED as u32 + (left.to_bits() & 0xff);
                (fx[column], fy[column]) = (x - (left - FLOOR), y - (top - FLOOR));
            }
            for (column, pixel) in line.iter_mut().enumerate() {
                let at = (at[column] as usize).min(PADDED * PADDED - PADDED - 2);
                let (fx, p) = (fx[column], &self.0[at..at + PADDED + 2]);
                let over = p[0] + (p[1] - p[0]) * fx;
                let under = p[PADDED] + (p[PADDED + 1] - p[PADDED]) * fx;
                *pixel = over + (under - over) * fy[column];
            }
        }
        out
    }

    /// The picture's descriptor, after the move.
    pub fn describe(&self, m: Move, out: &mut [u8; DIMS]) {
        let drawn = self.draw(m);
        let mut slopes = [0.0; 128];
        for (band, slopes) in slopes.chunks_exact_mut(32).enumerate() {
            slopes_of(&drawn, band, slopes);
        }
        let mut pixels = [0.0f32; 64];
        for (i, pixel) in pixels.iter_mut().enumerate() {
            let at = (i / 8) * 2 * SIDE + (i % 8) * 2;
            *pixel = drawn[at] + drawn[at + 1] + drawn[at + SIDE] + drawn[at + SIDE + 1];
        }
        // Roots, so that few strong slopes do not drown the rest.
        for at in (0..slopes.len()).step_by(LANES) {
            Lanes::load(&slopes, at).sqrt().store(&mut slopes, at);
        }
        pack(&slopes, SLOPES_LENGTH, &mut out[..128]);
        pack(&pixels, PIXELS_LENGTH, &mut out[128..]);
    }
}

/// The share of each direction in the slopes of a band of four rows, by cells of four columns.
fn slopes_of(drawn: &[f32; SIDE * SIDE], band: usize, out: &mut [f32]) {
    let mut shares = [[0.0f32; SIDE]; 8];
    for row in (band * 4).max(1)..(band * 4 + 4).min(SIDE - 1) {
        let line = |row: usize| &drawn[row * SIDE..][..SIDE];
        let (above, here, below) = (line(row - 1), line(row), line(row + 1));
        let mut dx = [0.0f32; SIDE];
        let mut dy = [0.0f32; SIDE];
        for column in 1..SIDE - 1 {
            dx[column] = here[column + 1] - here[column - 1];
            dy[column] = below[column] - above[column];
        }
        for (share, &(c, s)) in shares.iter_mut().zip(&DIRECTIONS) {
            for column in 0..SIDE {
                share[column] += (dx[column] * c + dy[column] * s).max(0.0);
            }
        }
    }
    for (direction, share) in shares.iter().enumerate() {
        for (cell, part) in share.chunks_exact(4).enumerate() {
            out[cell * 8 + direction] = (part[0] + part[1]) + (part[2] + part[3]);
        }
    }
}

/// Sine and cosine of an angle between -pi and pi, to about 1e-5.
fn sin_cos(x: f32) -> (f32, f32) {
    let half = x * 0.5; // the series are for small angles: halve twice over, double back
    let y = half * half;
    let s = half * (1.0 - y / 6.0 * (1.0 - y / 20.0 * (1.0 - y / 42.0 * (1.0 - y / 72.0))));
    let c = 1.0 - y / 2.0 * (1.0 - y / 12.0 * (1.0 - y / 30.0 * (1.0 - y / 56.0)));
    (2.0 * s * c, c * c - s * s)
}

/// Scales numbers to a length and rounds them to signed bytes.
fn pack(numbers: &[f32], length: f32, out: &mut [u8]) {
    // Added to a small number, this leaves its nearest integer in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let mut square = Lanes::all(0.0);
    for at in (0..numbers.len()).step_by(LANES) {
        let four = Lanes::load(numbers, at);
        square += four * four;
    }
    let factor = length / sqrt(square.sum()).max(1e-6);
    for (byte, x) in out.iter_mut().zip(numbers) {
        *byte = ((x * factor).clamp(-127.0, 127.0) + ROUND).to_bits() as u8;
    }
}

/// How alike two descriptors are: the sum of the products of their signed bytes.
#[inline(always)]
pub fn likeness(a: &[u8], b: &[u8]) -> i32 {
    a.iter()
        .zip(b)
        .map(|(a, b)| i32::from(*a as i8) * i32::from(*b as i8))
        .sum()
}

/// A descriptor, or some of them, as wider numbers: what `likeness_wide` takes, which is faster.
pub fn widen(bytes: &[u8]) -> impl Iterator<Item = i16> {
    bytes.iter().map(|byte| i16::from(*byte as i8))
}

/// As `likeness`.
#[inline(always)]
pub fn likeness_wide(a: &[i16], b: &[i16]) -> i32 {
    a.iter()
        .zip(b)
        .map(|(a, b)| i32::from(*a) * i32::from(*b))
        .sum()
}
