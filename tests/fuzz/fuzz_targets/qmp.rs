//! What a QMP client sends, cut into reads at any place: every text is answered or becomes a command, and each answer is one line.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The first byte says how long reads are; the texts follow.
    let Some((first, text)) = data.split_first() else { return };
    let reads = text.chunks(usize::from(*first) + 1).map(|read| (read, first & 1 != 0));
    for answer in vmm::qmp::fuzz::stream(reads) {
        assert!(answer.ends_with("\r\n") && !answer[..answer.len() - 2].contains(['\r', '\n']), "{answer:?}");
        assert!(answer.starts_with('{') && answer.contains("\"error\""), "{answer:?}");
    }
});
