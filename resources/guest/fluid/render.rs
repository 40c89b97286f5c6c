//! A picture of a tank: particles as smooth splats, coloured by dye and speed, lit by the slope of
//! their sum. Works in bands of rows, so that it needs little memory besides the picture.

use alloc::vec;
use alloc::vec::Vec;

use crate::math::sqrt;

use crate::sim::{DYE, GLOW, HEIGHT, WIDTH, X, Y, field};

/// Bounds of a picture's width and height.
pub const SIZE_MIN: usize = 16;
/// See above.
pub const SIZE_MAX: usize = 1024;
const BAND: usize = 32;
/// Radius of a splat, in the tank's units.
const SPLAT: f32 = 1.15;

/// Sums over the splats that cover a pixel.
#[derive(Clone, Copy, Default)]
struct Pixel {
    weight: f32,
    speed: f32,
    dye: f32,
}

/// The picture: RGB bytes, row by row from the top.
pub fn picture(tank: &[f32], width: usize, height: usize) -> Vec<u8> {
    let mut rgb = Vec::with_capacity(width * height * 3);
    // A row above and one below the band, for slopes.
    let mut band = vec![Pixel::default(); width * (BAND + 2)];
    let scale = (width as f32 / WIDTH, height as f32 / HEIGHT);
    for top in (0..height).step_by(BAND) {
        band.fill(Pixel::default());
        splat(tank, &mut band, width, height, top, scale);
        for row in 0..BAND.min(height - top) {
            let sky = (top + row) as f32 / height as f32;
            for column in 0..width {
                let at = (row + 1) * width + column;
                let left = band[at - usize::from(column > 0)].weight;
                let right = band[at + usize::from(column + 1 < width)].weight;
                let slope = (
                    right - left,
                    band[at + width].weight - band[at - width].weight,
                );
                rgb.extend_from_slice(&shade(band[at], slope, scale, sky));
            }
        }
    }
    rgb
}

fn splat(
    tank: &[f32],
    band: &mut [Pixel],
    width: usize,
    height: usize,
    top: usize,
    scale: (f32, f32),
) {
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
        let (low, high) = (
            (y - reach_y).max(0.0) as usize,
            ((y + reach_y) as usize + 1).min(rows),
        );
        let left = (x - reach_x).max(0.0) as usize;
        let right = ((x + reach_x) as usize + 1).min(width);
        for row in low..high {
            let dy = (row as f32 + 0.5 - y) / reach_y;
            for column in left..right {
                let dx = (column as f32 + 0.5 - x) / reach_x;
                let fall = (1.0 - dx * dx - dy * dy).max(0.0);
                let weight = fall * fall;
                let pixel = &mut band[row * width + column];
                pixel.weight += weight;
                pixel.speed += weight * glows[i];
                pixel.dye += weight * dyes[i];
            }
        }
    }
}

fn mix(a: [f32; 3], b: [f32; 3], t: f32) -> [f32; 3] {
    core::array::from_fn(|i| a[i] + (b[i] - a[i]) * t)
}

fn smooth(low: f32, high: f32, x: f32) -> f32 {
    let t = ((x - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

fn shade(pixel: Pixel, slope: (f32, f32), scale: (f32, f32), sky: f32) -> [u8; 3] {
    const TOP: [f32; 3] = [0.05, 0.06, 0.10];
    const BOTTOM: [f32; 3] = [0.10, 0.12, 0.18];
    const DEEP: [f32; 3] = [0.03, 0.16, 0.48];
    const TEAL: [f32; 3] = [0.02, 0.44, 0.52];
    const FOAM: [f32; 3] = [0.85, 0.96, 1.0];
    let back = mix(TOP, BOTTOM, sky);
    let cover = smooth(0.55, 1.0, pixel.weight);
    let mut colour = back;
    if cover > 0.0 {
        let speed = pixel.speed / pixel.weight;
        let dye = pixel.dye / pixel.weight;
        let body = mix(mix(DEEP, TEAL, dye), FOAM, smooth(0.06, 0.42, speed) * 0.8);
        // Light from the upper left; the sum of splats is taken for height, in the tank's units.
        let (nx, ny) = (-slope.0 * scale.0 * 0.25, -slope.1 * scale.1 * 0.25);
        let light = (nx * -0.45 + ny * -0.6 + 0.66) / sqrt(nx * nx + ny * ny + 1.0);
        let shine = smooth(0.80, 0.99, light) * 0.35;
        let lit = body.map(|c| c * (0.72 + 0.42 * light.max(0.0)) + shine);
        colour = mix(back, lit, cover);
    }
    colour.map(|c| (sqrt(c.clamp(0.0, 1.0)) * 255.0) as u8)
}
