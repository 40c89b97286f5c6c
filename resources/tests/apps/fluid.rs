//! The liquid, run on the host: it stays in its tank, it answers, and it notices damage.

use crate::sim::{self, FIELDS, HEIGHT, Scratch, WIDTH, X, Y, field};
use crate::tanks::{Settings, Tanks};

/// Index of the array of densities.
const DENSITY: usize = 6;

#[test]
fn particles_stay_in_the_tank_and_come_to_rest_at_the_bottom() {
    let mut tank = vec![0.0; 1000 * FIELDS];
    let mut scratch = Scratch::new(1000);
    sim::fill(&mut tank, 7);
    for step in 0..160 {
        if step % 30 == 0 && step < 70 {
            sim::poke(&mut tank, 0.5, 0.1, 4.0);
        }
        sim::step(&mut tank, &mut scratch);
        for (x, y) in field(&tank, X).iter().zip(field(&tank, Y)) {
            assert!(
                (0.0..=WIDTH).contains(x) && (0.0..=HEIGHT).contains(y),
                "at {x} {y}"
            );
        }
    }
    let mean = field(&tank, Y).iter().sum::<f32>() / 1000.0;
    assert!((0.5..6.0).contains(&mean), "mean height {mean}");
    let density = field(&tank, DENSITY).iter().sum::<f32>() / 1000.0;
    assert!((1.5..5.0).contains(&density), "mean density {density}");
}

#[test]
fn the_same_seed_gives_the_same_liquid() {
    let run = || {
        let mut tanks =
            Tanks::new(Settings::parse("tanks=3 particles=500 seed=9").unwrap()).unwrap();
        tanks.warm_up();
        assert_eq!(tanks.bytes(), 3 * 500 * FIELDS * 4);
        tanks.step().unwrap();
        tanks.request("poke 2 0.5 0.2 1").unwrap();
        (
            tanks.request("frame 2 64 48").unwrap(),
            tanks.verify().unwrap(),
        )
    };
    let ((text, rgb), verified) = run();
    assert!(text.starts_with("tank 2 step 4 state "), "{text}");
    assert_eq!(rgb.len(), 64 * 48 * 3);
    assert_eq!(run(), ((text, rgb), verified));
}

#[test]
fn a_poked_tank_is_next() {
    let mut tanks = Tanks::new(Settings::parse("tanks=5 particles=64 warmup=0").unwrap()).unwrap();
    tanks.request("poke 3 0.1 0.1 1 16 16").unwrap();
    tanks.step().unwrap();
    let (text, _) = tanks.request("frame 3 16 16").unwrap();
    assert!(text.starts_with("tank 3 step 2 "), "{text}");
    let (text, _) = tanks.request("stats").unwrap();
    assert!(text.ends_with("steps 1 next 0"), "{text}");
}

#[test]
fn wrong_words_are_named() {
    for (params, part) in [
        ("tanks=0", "tanks is `0`"),
        ("tonks=1", "`tonks=1` is none of"),
    ] {
        assert!(Settings::parse(params).err().unwrap().contains(part));
    }
    let mut tanks = Tanks::new(Settings::parse("tanks=1 particles=64 warmup=0").unwrap()).unwrap();
    for (request, part) in [
        ("", "`` is not understood"),
        ("frame", "TANK is missing"),
        ("frame 1", "TANK is `1`, not a number from 0 to 0"),
        ("poke 0 NaN 0 0", "X is `NaN`"),
        ("frame 0 4000 20", "W is `4000`"),
        ("frame 0 40", "H is missing"),
        ("advance 0 0", "STEPS is `0`"),
    ] {
        let error = tanks.request(request).unwrap_err();
        assert!(error.contains(part), "{request}: {error}");
    }
}

/// Writes pictures of a tank as it splashes, to look at: set FLUID_PICTURES to a folder.
#[test]
fn pictures_are_not_all_of_one_colour() {
    let mut tanks = Tanks::new(Settings::parse("tanks=1 seed=3").unwrap()).unwrap();
    for i in 0..6 {
        let (text, rgb) = tanks.request("frame 0").unwrap();
        assert!(text.contains("640x480"), "{text}");
        let colours: std::collections::HashSet<_> = rgb.chunks_exact(3).collect();
        assert!(colours.len() > 500, "{} colours", colours.len());
        if let Some(folder) = std::env::var_os("FLUID_PICTURES") {
            let path = std::path::Path::new(&folder).join(format!("frame{i}.ppm"));
            std::fs::write(path, [b"P6 640 480 255\n", &rgb[..]].concat()).unwrap();
        }
        tanks.request("advance 0 12").unwrap();
        if i == 3 {
            tanks.request("poke 0 0.5 0.2 3").unwrap();
        }
    }
}

#[test]
fn more_than_there_is_memory_for_is_refused() {
    let settings = Settings {
        tanks: usize::MAX / 1_000_000,
        particles: 9000,
        rate_hz: 0,
        dirty: 0,
        warmup: 0,
        seed: 0,
    };
    assert!(Tanks::new(settings).err().unwrap().contains("no memory"));
}
