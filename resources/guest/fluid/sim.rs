//! One tank of liquid: smoothed particles with a double density relaxation (after Clavet, Beaudoin and
//! Poulin, 2005). Lengths are in units of the smoothing radius, time in substeps.
//!
//! A tank is `FIELDS` arrays of numbers, one after the other, in one slice. What it will be depends on
//! nothing but itself and its pokes.

use alloc::vec;
use alloc::vec::Vec;

use crate::lanes::{LANES, Lanes};
use crate::math::{Random, sqrt};

/// Numbers kept of each particle.
pub const FIELDS: usize = 10;
/// The tank's size.
pub const WIDTH: f32 = 64.0;
/// The tank's size.
pub const HEIGHT: f32 = 48.0;
/// Most and fewest particles of a tank: more do not fit into it without pressing on each other.
pub const PARTICLES_MAX: usize = 9000;
/// See above.
pub const PARTICLES_MIN: usize = 64;
/// Substeps of a step.
pub const SUBSTEPS: usize = 4;

const GRAVITY: f32 = 0.004;
const REST_DENSITY: f32 = 2.2;
const STIFFNESS: f32 = 0.035;
const NEAR_STIFFNESS: f32 = 0.07;
const VISCOSITY: f32 = 0.02;
const SPEED_MAX: f32 = 0.45;
const MARGIN: f32 = 0.35;
const COLUMNS: usize = WIDTH as usize;
const ROWS: usize = HEIGHT as usize;

// The arrays: position, velocity, position before the substep, density, near density, and these two.
/// Index of an array: position.
pub const X: usize = 0;
/// Index of an array: position.
pub const Y: usize = 1;
/// Index of an array: speed, smoothed over time.
pub const GLOW: usize = 8;
/// Index of an array: dye that was in the particle from the start, smoothed with its neighbours'.
pub const DYE: usize = 9;

/// One array of a tank.
pub fn field(tank: &[f32], index: usize) -> &[f32] {
    let n = tank.len() / FIELDS;
    &tank[index * n..(index + 1) * n]
}

/// All arrays of a tank.
struct Fields<'a>([&'a mut [f32]; FIELDS]);

impl<'a> Fields<'a> {
    fn of(tank: &'a mut [f32]) -> Fields<'a> {
        let n = tank.len() / FIELDS;
        let mut parts = tank.chunks_exact_mut(n);
        Fields(core::array::from_fn(|_| parts.next().unwrap_or_default()))
    }
}

/// What a step needs besides the tank. Holds nothing from one step to the next.
pub struct Scratch {
    starts: Vec<u32>,
    cells: Vec<u32>,
    order: Vec<u32>,
    /// By place in `order`: position, velocity, pressure, near pressure, dye. A little longer than
    /// there are particles, so that whole lanes may be read at the end.
    sorted: [Vec<f32>; 7],
}

impl Scratch {
    /// For tanks of so many particles.
    pub fn new(particles: usize) -> Scratch {
        Scratch {
            starts: vec![0; COLUMNS * ROWS + 1],
            cells: vec![0; particles],
            order: vec![0; particles],
            sorted: core::array::from_fn(|_| vec![0.0; particles + LANES]),
        }
    }

    /// Puts the particles in the order of their cells.
    fn sort(&mut self, x: &[f32], y: &[f32]) {
        self.starts.fill(0);
        for (cell, (x, y)) in self.cells.iter_mut().zip(x.iter().zip(y)) {
            *cell = (row(*y) * COLUMNS + column(*x)) as u32;
            self.starts[*cell as usize + 1] += 1;
        }
        for i in 1..self.starts.len() {
            self.starts[i] += self.starts[i - 1];
        }
        // Placing moves each start up to its cell's end; the cell before it ends where it began.
        for (i, cell) in self.cells.iter().enumerate() {
            let at = &mut self.starts[*cell as usize];
            self.order[*at as usize] = i as u32;
            *at += 1;
        }
        for i in (1..self.starts.len()).rev() {
            self.starts[i] = self.starts[i - 1];
        }
        self.starts[0] = 0;
    }

    /// Where the neighbours of a place are: a range of `order` for each of up to three rows.
    fn near(&self, x: f32, y: f32) -> impl Iterator<Item = core::ops::Range<usize>> {
        let (column, row) = (column(x), row(y));
        let (left, right) = (column.saturating_sub(1), (column + 1).min(COLUMNS - 1));
        (row.saturating_sub(1)..=(row + 1).min(ROWS - 1)).map(move |row| {
            let first = self.starts[row * COLUMNS + left] as usize;
            first..self.starts[row * COLUMNS + right + 1] as usize
        })
    }
}

fn column(x: f32) -> usize {
    (x.max(0.0) as usize).min(COLUMNS - 1)
}

fn row(y: f32) -> usize {
    (y.max(0.0) as usize).min(ROWS - 1)
}

/// Fills a tank: a column of liquid at a place and of a shape that the seed decides, about to fall.
pub fn fill(tank: &mut [f32], seed: u64) {
    let n = tank.len() / FIELDS;
    let mut random = Random::new(seed);
    tank.fill(0.0);
    let Fields([x, y, vx, vy, bx, by, _, _, _, dye]) = Fields::of(tank);
    let spacing = 0.47;
    let wide = random.between(0.45, 0.85) * (WIDTH - 2.0 * MARGIN);
    let tall = n as f32 * spacing * spacing / (HEIGHT - 2.0 * MARGIN - 1.0);
    let wide = wide.max(tall).min(WIDTH - 2.0 * MARGIN);
    let left = MARGIN + random.between(0.0, 1.0) * (WIDTH - 2.0 * MARGIN - wide);
    let push = random.between(-0.15, 0.15);
    let columns = ((wide / spacing) as usize).max(1);
    for i in 0..n {
        let (column, row) = (i % columns, i / columns);
        x[i] = left + (column as f32 + random.between(0.3, 0.7)) * spacing;
        y[i] = MARGIN + (row as f32 + random.between(0.3, 0.7)) * spacing;
        vx[i] = push + random.between(-0.01, 0.01);
        vy[i] = random.between(-0.01, 0.01);
        (bx[i], by[i]) = (x[i], y[i]);
        dye[i] = (column as f32 / columns as f32 + random.between(-0.05, 0.05)).clamp(0.0, 1.0);
    }
}

/// One step.
pub fn step(tank: &mut [f32], scratch: &mut Scratch) {
    for _ in 0..SUBSTEPS {
        substep(&mut Fields::of(tank), scratch);
    }
}

fn substep(fields: &mut Fields<'_>, scratch: &mut Scratch) {
    let Fields([x, y, vx, vy, bx, by, density, near, glow, dye]) = fields;
    for i in 0..x.len() {
        vy[i] -= GRAVITY;
        (bx[i], by[i]) = (x[i], y[i]);
        x[i] = (x[i] + vx[i]).clamp(MARGIN, WIDTH - MARGIN);
        y[i] = (y[i] + vy[i]).clamp(MARGIN, HEIGHT - MARGIN);
    }
    scratch.sort(x, y);
    gather(scratch, [x, y, vx, vy, dye]);
    densities(scratch, density, near);
    relax(scratch, [x, y, vx, vy, dye]);
    for i in 0..x.len() {
        // vx and vy hold the change by viscosity, on top of the way actually gone.
        x[i] = x[i].clamp(MARGIN, WIDTH - MARGIN);
        y[i] = y[i].clamp(MARGIN, HEIGHT - MARGIN);
        vx[i] += x[i] - bx[i];
        vy[i] += y[i] - by[i];
        let speed = sqrt(vx[i] * vx[i] + vy[i] * vy[i]);
        if speed > SPEED_MAX {
            vx[i] *= SPEED_MAX / speed;
            vy[i] *= SPEED_MAX / speed;
        }
        glow[i] += (speed - glow[i]) * 0.08;
    }
}

/// Copies what the neighbour loops read into the order of the cells.
fn gather(scratch: &mut Scratch, [x, y, vx, vy, dye]: [&[f32]; 5]) {
    let [sx, sy, svx, svy, _, _, sdye] = &mut scratch.sorted;
    for (place, &i) in scratch.order.iter().enumerate() {
        let i = i as usize;
        (sx[place], sy[place]) = (x[i], y[i]);
        (svx[place], svy[place]) = (vx[i], vy[i]);
        sdye[place] = dye[i];
    }
}

/// Density and near density of each particle, and the pressures that follow.
fn densities(scratch: &mut Scratch, density: &mut [f32], near: &mut [f32]) {
    let (zero, one) = (Lanes::all(0.0), Lanes::all(1.0));
    for place in 0..scratch.order.len() {
        let [sx, sy, ..] = &scratch.sorted;
        let (x, y) = (Lanes::all(sx[place]), Lanes::all(sy[place]));
        let (mut sum, mut sum_near) = (zero, zero);
        for range in scratch.near(sx[place], sy[place]) {
            for j in range.clone().step_by(LANES) {
                let (dx, dy) = (Lanes::load(sx, j) - x, Lanes::load(sy, j) - y);
                let q = (one - (dx * dx + dy * dy).sqrt())
                    .max(zero)
                    .first(range.end - j);
                let square = q * q;
                sum += square;
                sum_near += square * q;
            }
        }
        // The particle met itself, at distance 0.
        let i = scratch.order[place] as usize;
        (density[i], near[i]) = (sum.sum() - 1.0, sum_near.sum() - 1.0);
        scratch.sorted[4][place] = STIFFNESS * (density[i] - REST_DENSITY);
        scratch.sorted[5][place] = NEAR_STIFFNESS * near[i];
    }
}

/// Moves the particles apart or together, and leaves the change of velocity by viscosity in `vx`, `vy`.
fn relax(scratch: &Scratch, [x, y, vx, vy, dye]: [&mut [f32]; 5]) {
    let (zero, one, half) = (Lanes::all(0.0), Lanes::all(1.0), Lanes::all(0.5));
    let least = Lanes::all(1e-4);
    let [sx, sy, svx, svy, pressures, near_pressures, sdye] = &scratch.sorted;
    for (place, &i) in scratch.order.iter().enumerate() {
        let own = |of: &[f32]| Lanes::all(of[place]);
        let (px, py, ux, uy) = (own(sx), own(sy), own(svx), own(svy));
        let (pressure, near_pressure) = (own(pressures), own(near_pressures));
        let [mut mx, mut my, mut ax, mut ay, mut tint, mut weight] = [zero; 6];
        for range in scratch.near(sx[place], sy[place]) {
            for j in range.clone().step_by(LANES) {
                let at = |of: &[f32]| Lanes::load(of, j);
                // The particle itself has distance 0 and adds nothing but its own dye.
                let (dx, dy) = (at(sx) - px, at(sy) - py);
                let r = (dx * dx + dy * dy).sqrt().max(least);
                let q = (one - r).max(zero).first(range.end - j);
                let push = ((pressure + at(pressures)) + (near_pressure + at(near_pressures)) * q)
                    * q
                    * half.over(r);
                mx += push * dx;
                my += push * dy;
                ax += (at(svx) - ux) * q;
                ay += (at(svy) - uy) * q;
                tint += at(sdye) * q;
                weight += q;
            }
        }
        let i = i as usize;
        x[i] -= mx.sum().clamp(-0.25, 0.25);
        y[i] -= my.sum().clamp(-0.25, 0.25);
        vx[i] = VISCOSITY * ax.sum();
        vy[i] = VISCOSITY * ay.sum();
        dye[i] += (tint.sum() / weight.sum() - dye[i]) * 0.002;
    }
}

/// Pushes the liquid away from a place, both between 0 and 1 of the tank, by a force of about 1.
pub fn poke(tank: &mut [f32], at_x: f32, at_y: f32, force: f32) {
    const REACH: f32 = 9.0;
    let Fields([x, y, vx, vy, ..]) = Fields::of(tank);
    let (at_x, at_y) = (at_x * WIDTH, at_y * HEIGHT);
    for i in 0..x.len() {
        let (dx, dy) = (x[i] - at_x, y[i] - at_y);
        let r = sqrt(dx * dx + dy * dy).max(0.1);
        if r < REACH {
            let push = force * 0.4 * (1.0 - r / REACH) / r;
            vx[i] += push * dx;
            vy[i] += push * dy + force * 0.1 * (1.0 - r / REACH);
        }
    }
}
