//! What the host says to the agent: requests within limits, cut out of any stream of bytes, which say
//! the same when they are said again.

#![no_main]

use cloudlet_agent::protocol::{Decoder, Frame, HEADER_LEN, PAYLOAD_MAX, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&step, bytes)) = data.split_first() else {
        return;
    };
    let mut decoder = Decoder::default();
    for mut piece in bytes.chunks(usize::from(step) + 1) {
        decoder.fill(&mut piece).expect("a slice can be read");
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => check(frame),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    // One frame of each kind with what is left, past the header's checks.
    if let Some((&kind, payload)) = bytes.split_first()
        && payload.len() <= PAYLOAD_MAX
    {
        check(Frame { kind, payload });
    }
});

fn check(frame: Frame<'_>) {
    let Ok(request) = Request::decode(frame) else {
        return;
    };
    if let Request::Exec(exec) = &request {
        assert!(!exec.arguments.is_empty());
        assert!(exec.arguments.iter().all(|word| !word.contains(&0)));
    }
    let mut again = Vec::new();
    request.encode(&mut again).expect("it was short enough");
    assert_eq!(again[0], frame.kind);
    assert_eq!(&again[HEADER_LEN..], frame.payload);
}
