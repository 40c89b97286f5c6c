//! The recogniser, run on the host: it knows pictures it has not seen, and notices damage.

use crate::recogniser::{Recogniser, Settings};
use cloudlet_resources::digits;

fn recogniser(params: &str) -> Recogniser {
    Recogniser::new(&Settings::parse(params).unwrap(), &digits::training()).unwrap()
}

#[test]
fn pictures_held_back_are_recognised() {
    let params = std::env::var("OBJECT_PARAMS").unwrap_or("mib=8".into());
    let begin = std::time::Instant::now();
    let recogniser = recogniser(&params);
    println!("{} in {:?}", recogniser.stats(), begin.elapsed());
    let (mut right, mut all, mut looked) = (0, 0, 0);
    let begin = std::time::Instant::now();
    for picture in digits::held_back() {
        let found = recogniser.recognise(picture.pixels).unwrap();
        right += usize::from(found.label == picture.label);
        looked += found.looked;
        all += 1;
    }
    let share = f64::from(right as u32) / f64::from(all);
    println!(
        "{share:.4} right, {} looked at, {:?} each",
        looked / all as usize,
        begin.elapsed() / all
    );
    assert!(share > 0.95, "{right} of {all} right");
}

#[test]
fn damage_is_noticed_where_it_is() {
    let mut recogniser = recogniser("mib=1 probes=64");
    let sound = recogniser.verify().unwrap();
    recogniser.index_mut().records_mut()[5000] ^= 1;
    let error = recogniser.verify().unwrap_err();
    assert!(
        error.contains("list") && error.contains("damaged"),
        "{error}"
    );
    let asked = digits::held_back().find_map(|p| recogniser.recognise(p.pixels).err());
    assert_eq!(asked.unwrap(), error);
    recogniser.index_mut().records_mut()[5000] ^= 1;
    assert_eq!(recogniser.verify().unwrap(), sound);
}

#[test]
fn nonsense_is_refused() {
    assert!(Settings::parse("mib=0").is_err());
    let settings = Settings::parse("mib=1").unwrap();
    for data in [&[][..], &[0; 64], &[99; 65]] {
        assert!(Recogniser::new(&settings, data).is_err());
    }
    let recogniser = recogniser("mib=1");
    assert!(recogniser.request("recognise", &[0; 63]).is_err());
    assert!(recogniser.request("recognise", &[17; 64]).is_err());
    assert!(
        recogniser
            .request("sing", &[])
            .unwrap_err()
            .contains("`sing` is not understood")
    );
    let picture = digits::held_back().next().unwrap();
    let answer = recogniser.request("recognise", picture.pixels).unwrap();
    assert!(answer.starts_with("label "), "{answer}");
}
