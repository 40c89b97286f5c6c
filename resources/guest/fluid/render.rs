//! A picture of a tank: particles as smooth splats, coloured by dye and speed, lit by the slope of
//! their sum. Works in bands of rows, so that it needs little memory besides the picture.

use alloc::vec;
use alloc::vec::Vec;
use core::ops::Range;

use crate::math::sqrt;

use crate::sim::{DYE, GLOW, HEIGHT, WIDTH, X, Y, field};

/// Bounds of a picture's width and height.
pub const SIZE_MIN: usize = 16;
/// See above.
pub const SIZE_MAX: usize = 1024;
const BAND: usize = 32;
/// Sums of splats from which on a pixel is seen, and fully seen.
const COVER: (f32, f32) = (0.55, 1.0);
/// Radius of a splat, in the tank's units.
const SPLAT: f32 = 1.15;

/// Sums over the splats that cover each pixel of a band, and of a row above and one below it.
struct Band {
    width: usize,
    weight: Vec<f32>,
    speed: Vec<f32>,
    dye: Vec<f32>,
}

/// What covers a pixel.
#[derive(Clone, Copy)]
struct Pixel {
    weight: f32,
    speed: f32,
    dye: f32,
    slope: (f32, f32),
}

/// The picture: RGB bytes, row by row from the top.
pub fn picture(tank: &[f32], width: usize, height: usize) -> Vec<u8> {
    let mut rgb = Vec::with_capacity(width * height * 3);
    let len = width * (BAND + 2);
    let mut band = Band {
        width,
        weight: vec![0.0; len],
        speed: vec![0.0; len],
        dye: vec![0.0; len],
    };
    let scale = (width as f32 / WIDTH, height as f32 / HEIGHT);
    for top in (0..height).step_by(BAND) {
        band.splat(tank, height, top, scale);
        for row in 0..BAND.min(height - top) {
            let back = background((top + row) as f32 / height as f32);
            let bare = bytes(back);
            for column in 0..width {
                match band.pixel(row + 1, column) {
                    Some(pixel) => rgb.extend_from_slice(&bytes(shade(pixel, scale, back))),
                    None => rgb.extend_from_slice(&bare),
                }
            }
        }
    }
    rgb
}

impl Band {
    fn splat(&mut self, tank: &[f32], height: usize, top: usize, scale: (f32, f32)) {
        self.weight.fill(0.0);
        self.speed.fill(0.0);
        self.dye.fill(0.0);
        let (xs, ys) = (field(tank, X), field(tank, Y));
        let (glows, dyes) = (field(tank, GLOW), field(tank, DYE));
        let (reach_x, reach_y) = (SPLAT * scale.0, SPLAT * scale.1);
        let first = top as f32 - 1.0;
        let rows = BAND + 2;
        for i in 0..xs.len() {
            let (x, y) = (xs[i] * scale.0, height as f32 - ys[i] * scale.1 - first);
            if y + reach_y < 0.0 || y - reach_y > rows as f32 {
                continue;
            }
            let low = (y - reach_y).max(0.0) as usize;
            let high = ((y + reach_y) as usize + 1).min(rows);
            for row in low..high {
                let dy = (row as f32 + 0.5 - y) / reach_y;
                // Only as wide as the splat is at this height.
                let half = sqrt((1.0 - dy * dy).max(0.0)) * reach_x;
                let left = (x - half).max(0.0) as usize;
                let right = ((x + half) as usize + 1).min(self.width);
                if left < right {
                    let run = row * self.width + left..row * self.width + right;
                    let from = (left as f32 + 0.5 - x) / reach_x;
                    self.run(run, from, 1.0 / reach_x, 1.0 - dy * dy, [glows[i], dyes[i]]);
                }
            }
        }
    }

    /// Adds a splat's row of pixels.
    fn run(&mut self, run: Range<usize>, from: f32, step: f32, top: f32, [glow, dye]: [f32; 2]) {
        let weights = &mut self.weight[run.clone()];
        let speeds = &mut self.speed[run.clone()];
        let dyes = &mut self.dye[run];
        let pixels = weights.iter_mut().zip(speeds).zip(dyes).enumerate();
        for (i, ((weight, speed), tint)) in pixels {
            let dx = from + i as i32 as f32 * step;
            let fall = (top - dx * dx).max(0.0);
            let share = fall * fall;
            *weight += share;
            *speed += share * glow;
            *tint += share * dye;
        }
    }

    /// What covers a pixel; none if nothing to be seen does.
    fn pixel(&self, row: usize, column: usize) -> Option<Pixel> {
        let at = row * self.width + column;
        let weight = self.weight[at];
        if weight <= COVER.0 {
            return None;
        }
        let left = self.weight[at - usize::from(column > 0)];
        let right = self.weight[at + usize::from(column + 1 < self.width)];
        let slope = (
            right - left,
            self.weight[at + self.width] - self.weight[at - self.width],
        );
        Some(Pixel {
            weight,
            speed: self.speed[at] / weight,
            dye: self.dye[at] / weight,
            slope,
        })
    }
}

fn mix(a: [f32; 3], b: [f32; 3], t: f32) -> [f32; 3] {
    core::array::from_fn(|i| a[i] + (b[i] - a[i]) * t)
}

fn smooth(low: f32, high: f32, x: f32) -> f32 {
    let t = ((x - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

fn background(sky: f32) -> [f32; 3] {
    mix([0.05, 0.06, 0.10], [0.10, 0.12, 0.18], sky)
}

fn shade(pixel: Pixel, scale: (f32, f32), back: [f32; 3]) -> [f32; 3] {
    const DEEP: [f32; 3] = [0.03, 0.16, 0.48];
    const TEAL: [f32; 3] = [0.02, 0.44, 0.52];
    const FOAM: [f32; 3] = [0.85, 0.96, 1.0];
    let body = mix(
        mix(DEEP, TEAL, pixel.dye),
        FOAM,
        smooth(0.06, 0.42, pixel.speed) * 0.8,
    );
    // Light from the upper left; the sum of splats is taken for height, in the tank's units.
    let (nx, ny) = (
        -pixel.slope.0 * scale.0 * 0.25,
        -pixel.slope.1 * scale.1 * 0.25,
    );
    let light = (nx * -0.45 + ny * -0.6 + 0.66) / sqrt(nx * nx + ny * ny + 1.0);
    let shine = smooth(0.80, 0.99, light) * 0.35;
    let lit = body.map(|c| c * (0.72 + 0.42 * light.max(0.0)) + shine);
    mix(back, lit, smooth(COVER.0, COVER.1, pixel.weight))
}

fn bytes(colour: [f32; 3]) -> [u8; 3] {
    colour.map(|c| (sqrt(c.clamp(0.0, 1.0)) * 255.0) as u8)
}
