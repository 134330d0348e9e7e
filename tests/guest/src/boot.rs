//! What the VMM told us at entry: command line, memory map, where ACPI is. Reads the Linux zero page or the PVH start info.

use core::ptr::read_unaligned;

/// A range of the memory map.
#[derive(Clone, Copy, Default)]
pub struct Region {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// E820 type; 1 is RAM.
    pub kind: u32,
}

const MAX_REGIONS: usize = 32;

/// All that the VMM told us.
#[derive(Clone, Copy)]
pub struct BootInfo {
    /// Kernel command line.
    pub command_line: &'static str,
    /// Address of the ACPI RSDP; 0 if we were not told.
    pub rsdp: u64,
    regions: [Region; MAX_REGIONS],
    count: usize,
}

/// Reads a value in low memory.
///
/// # Safety
/// `address` is mapped.
unsafe fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: the caller's; `T` is a plain number at every use.
    unsafe { read_unaligned(address as *const T) }
}

impl BootInfo {
    /// Reads the structure at `at`.
    ///
    /// # Safety
    /// `at` is the zero page (Linux x86 boot protocol), or the hvm_start_info if `pvh`; it and what it points to are mapped.
    pub unsafe fn read(at: u64, pvh: bool) -> Self {
        // SAFETY: offsets are those of the two boot protocols.
        let (text, rsdp, table, count, stride) = unsafe {
            if pvh {
                (
                    peek::<u64>(at + 24),
                    peek::<u64>(at + 32),
                    peek::<u64>(at + 40),
                    peek::<u32>(at + 48) as usize,
                    24,
                )
            } else {
                let count = usize::from(peek::<u8>(at + 0x1e8));
                (u64::from(peek::<u32>(at + 0x228)), peek::<u64>(at + 0x70), at + 0x2d0, count, 20)
            }
        };
        let mut regions = [Region::default(); MAX_REGIONS];
        let count = count.min(MAX_REGIONS);
        for (i, region) in regions[..count].iter_mut().enumerate() {
            let entry = table + i as u64 * stride;
            // SAFETY: `count` entries of `stride` bytes follow `table`.
            *region = unsafe { Region { start: peek(entry), size: peek(entry + 8), kind: peek(entry + 16) } };
        }
        // SAFETY: the command line ends with a NUL byte and lies in mapped memory.
        let command_line = unsafe { text_at(text) };
        Self { command_line, rsdp, regions, count }
    }

    /// The memory map.
    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.count]
    }

    /// Ranges of RAM only.
    pub fn ram(&self) -> impl Iterator<Item = Region> {
        self.regions().iter().copied().filter(|r| r.kind == 1)
    }

    /// The value of `NAME=VALUE` on the command line, without its quotes; every occurrence in turn.
    pub fn options(&self, name: &'static str) -> impl Iterator<Item = &'static str> {
        Words(self.command_line)
            .filter_map(move |word| word.strip_prefix(name)?.strip_prefix('='))
            .map(|value| value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap_or(value))
    }

    /// Whether the bare word `name` is on the command line.
    pub fn flag(&self, name: &str) -> bool {
        Words(self.command_line).any(|word| word == name)
    }
}

/// # Safety
/// `at` is 0 or a NUL-terminated string in mapped memory.
unsafe fn text_at(at: u64) -> &'static str {
    if at == 0 {
        return "";
    }
    // SAFETY: the caller's; 4096 bounds a string that never ends.
    let bytes = unsafe { core::slice::from_raw_parts(at as *const u8, 4096) };
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(0);
    core::str::from_utf8(&bytes[..end]).unwrap_or("")
}

/// Words separated by spaces, where double quotes keep spaces together.
struct Words(&'static str);

impl Iterator for Words {
    type Item = &'static str;

    fn next(&mut self) -> Option<&'static str> {
        self.0 = self.0.trim_ascii_start();
        let mut quoted = false;
        let end = self
            .0
            .bytes()
            .position(|b| {
                quoted ^= b == b'"';
                b == b' ' && !quoted
            })
            .unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at(end);
        self.0 = rest;
        (!word.is_empty()).then_some(word)
    }
}
