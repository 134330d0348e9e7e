//! Raw deflate (RFC 1951), for compressed clusters: owns the decoder. Output is bounded by the buffer given; input is hostile.

/// Most bits of a code (§3.2.7).
const MAX_BITS: usize = 15;
const LENGTH_BASE: [u16; 29] = [
    3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
    227, 258,
];
const LENGTH_EXTRA: [u8; 29] =
    [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const DISTANCE_BASE: [u16; 30] = [
    1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073,
    4097, 6145, 8193, 12289, 16385, 24577,
];
const DISTANCE_EXTRA: [u8; 30] =
    [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
/// Order in which the lengths of the code-length code come (§3.2.7).
const ORDER: [usize; 19] = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

struct Bits<'a> {
    input: &'a [u8],
    at: usize,
    held: u32,
    count: u32,
}

impl Bits<'_> {
    /// `n` <= 16 bits, the first of them lowest.
    fn take(&mut self, n: u32) -> Option<u32> {
        while self.count < n {
            self.held |= u32::from(*self.input.get(self.at)?) << self.count;
            self.at += 1;
            self.count += 8;
        }
        let value = self.held & ((1 << n) - 1);
        self.held >>= n;
        self.count -= n;
        Some(value)
    }
}

/// A canonical Huffman code: how many codes of each length, and their symbols in order.
struct Code {
    counts: [u16; MAX_BITS + 1],
    symbols: [u16; 288],
}

impl Code {
    /// `None`: more codes of some length than there can be.
    fn new(lengths: &[u8]) -> Option<Self> {
        let mut code = Self { counts: [0; MAX_BITS + 1], symbols: [0; 288] };
        for len in lengths {
            *code.counts.get_mut(usize::from(*len))? += 1;
        }
        code.counts[0] = 0;
        let mut left = 1i32;
        let mut starts = [0u16; MAX_BITS + 2];
        for len in 1..=MAX_BITS {
            left = (left << 1) - i32::from(code.counts[len]);
            if left < 0 {
                return None;
            }
            starts[len + 1] = starts[len] + code.counts[len];
        }
        for (symbol, len) in (0u16..).zip(lengths) {
            let len = usize::from(*len);
            if len > 0 {
                *code.symbols.get_mut(usize::from(starts[len]))? = symbol;
                starts[len] += 1;
            }
        }
        Some(code)
    }

    fn decode(&self, bits: &mut Bits<'_>) -> Option<u16> {
        let (mut code, mut first, mut index) = (0i32, 0i32, 0i32);
        for len in 1..=MAX_BITS {
            code |= bits.take(1)? as i32;
            let count = i32::from(self.counts[len]);
            if code - count < first {
                return self.symbols.get(usize::try_from(index + code - first).ok()?).copied();
            }
            index += count;
            first = (first + count) << 1;
            code <<= 1;
        }
        None
    }
}

/// Fills `output`. `None`: the input is damaged, or is not enough.
pub(super) fn inflate(input: &[u8], output: &mut [u8]) -> Option<()> {
    let mut bits = Bits { input, at: 0, held: 0, count: 0 };
    let mut done = 0;
    // Each round takes bits from the input, so this ends.
    while done < output.len() {
        let last = bits.take(1)? == 1;
        match bits.take(2)? {
            0 => stored(&mut bits, output, &mut done)?,
            1 => {
                let mut lengths = [8u8; 288];
                lengths[144..256].fill(9);
                lengths[256..280].fill(7);
                block(&mut bits, &Code::new(&lengths)?, &Code::new(&[5; 30])?, output, &mut done)?;
            }
            2 => {
                let (symbols, distances) = dynamic(&mut bits)?;
                block(&mut bits, &symbols, &distances, output, &mut done)?;
            }
            _ => return None,
        }
        if last {
            break;
        }
    }
    (done == output.len()).then_some(())
}

fn stored(bits: &mut Bits<'_>, output: &mut [u8], done: &mut usize) -> Option<()> {
    // Whole bytes that were read ahead go back.
    bits.at -= (bits.count / 8) as usize;
    (bits.held, bits.count) = (0, 0);
    let header = bits.input.get(bits.at..bits.at + 4)?;
    let (len, not) = (u16::from_le_bytes([header[0], header[1]]), u16::from_le_bytes([header[2], header[3]]));
    if len != !not {
        return None;
    }
    bits.at += 4;
    let from = bits.input.get(bits.at..bits.at + usize::from(len))?;
    let n = from.len().min(output.len() - *done);
    output[*done..*done + n].copy_from_slice(&from[..n]);
    *done += n;
    bits.at += from.len();
    Some(())
}

fn dynamic(bits: &mut Bits<'_>) -> Option<(Code, Code)> {
    let symbols = bits.take(5)? as usize + 257;
    let distances = bits.take(5)? as usize + 1;
    let codes = bits.take(4)? as usize + 4;
    if symbols > 286 || distances > 30 {
        return None;
    }
    let mut lengths = [0u8; 19];
    for place in ORDER.iter().take(codes) {
        lengths[*place] = bits.take(3)? as u8;
    }
    let code = Code::new(&lengths)?;
    let mut lengths = [0u8; 286 + 30];
    let mut at = 0;
    while at < symbols + distances {
        let symbol = code.decode(bits)?;
        let (value, times) = match symbol {
            0..=15 => (symbol as u8, 1),
            16 => (*lengths.get(at.checked_sub(1)?)?, 3 + bits.take(2)?),
            17 => (0, 3 + bits.take(3)?),
            _ => (0, 11 + bits.take(7)?),
        };
        let end = at + times as usize;
        if end > symbols + distances {
            return None;
        }
        lengths[at..end].fill(value);
        at = end;
    }
    Some((Code::new(&lengths[..symbols])?, Code::new(&lengths[symbols..symbols + distances])?))
}

/// Ends early, and well, when the output is full.
fn block(
    bits: &mut Bits<'_>,
    symbols: &Code,
    distances: &Code,
    output: &mut [u8],
    done: &mut usize,
) -> Option<()> {
    while *done < output.len() {
        let symbol = usize::from(symbols.decode(bits)?);
        match symbol {
            0..=255 => {
                output[*done] = symbol as u8;
                *done += 1;
            }
            256 => return Some(()),
            _ => {
                let at = symbol - 257;
                let extra = bits.take(u32::from(*LENGTH_EXTRA.get(at)?))?;
                let len = usize::from(LENGTH_BASE[at]) + extra as usize;
                let at = usize::from(distances.decode(bits)?);
                let extra = bits.take(u32::from(*DISTANCE_EXTRA.get(at)?))?;
                let distance = usize::from(DISTANCE_BASE[at]) + extra as usize;
                let from = done.checked_sub(distance)?;
                for i in 0..len.min(output.len() - *done) {
                    output[*done + i] = output[from + i];
                }
                *done = (*done + len).min(output.len());
            }
        }
    }
    Some(())
}
