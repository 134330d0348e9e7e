//! ELF: an unpacked kernel (`vmlinux`) or any program that starts by one of the two protocols. One with a PVH note is entered by
//! PVH, any other at its ELF entry by the Linux 64-bit protocol.

use linux_loader::elf::{EM_X86_64, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use vm_memory::{ByteValued, Bytes as _, GuestAddress};

use super::{CMDLINE_LIMIT, Entry, Kernel};
use crate::boot::BootError;
use crate::boot::file::BootFile;
use crate::memory::GuestMemory;
use crate::memory::layout::HIGH_RAM_START;

const MAGIC: &[u8] = b"\x7fELF";
const EI_CLASS: usize = 4;
const CLASS_64: u8 = 2;
const EI_DATA: usize = 5;
const LITTLE_ENDIAN: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
/// A vmlinux has 5 program headers; nothing sensible has more than this.
const MAX_SEGMENTS: u16 = 64;
/// Notes beyond this many bytes of a segment are not looked at.
const MAX_NOTES: u64 = 64 << 10;
/// `XEN_ELFNOTE_PHYS32_ENTRY`, owner "Xen": the PVH entry point.
const NOTE_PVH_ENTRY: u32 = 18;
const NOTE_OWNER: &[u8] = b"Xen\0";
/// An ELF kernel does not say how far its initrd may be; Linux's page tables of the first moment reach this far.
const INITRD_LIMIT: u64 = 0x3800_0000;

pub(super) fn is(head: &[u8]) -> bool {
    head.starts_with(MAGIC)
}

fn read<T: ByteValued + Default>(bytes: &[u8]) -> Option<T> {
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(bytes.get(..size_of::<T>())?);
    Some(value)
}

pub(super) fn load(
    file: &mut BootFile,
    head: &[u8],
    memory: &GuestMemory,
    low_end: u64,
    dirty: bool,
) -> Result<Kernel, BootError> {
    let header: Elf64_Ehdr =
        read(head).ok_or_else(|| file.not_a_kernel("is an ELF file cut short: copy it again"))?;
    check_header(&header).map_err(|why| file.not_a_kernel(why))?;
    let (mut end, mut pvh, mut entry) = (0, None, None);
    let segments = program_headers(file, head, &header)?;
    for segment in segments.iter().filter(|s| s.p_type == PT_LOAD && s.p_memsz > 0) {
        let last = check_segment(file, segment)?;
        file.check_fits(last, low_end)?;
        end = end.max(last);
        // Kernels link at virtual addresses; the entry of Linux is a physical one, that of others may be either.
        let inside = |base: u64| header.e_entry.checked_sub(base).filter(|offset| *offset < segment.p_filesz);
        let by_address = inside(segment.p_paddr).or_else(|| inside(segment.p_vaddr));
        entry = entry.or(by_address.map(|offset| segment.p_paddr + offset));
    }
    for segment in segments.iter().filter(|s| s.p_type == PT_LOAD && s.p_memsz > 0) {
        file.copy(segment.p_offset, memory, segment.p_paddr, segment.p_filesz)?;
        if dirty {
            zero(memory, segment.p_paddr + segment.p_filesz, segment.p_memsz - segment.p_filesz)?;
        }
    }
    for segment in segments.iter().filter(|s| s.p_type == PT_NOTE) {
        pvh = pvh.or(pvh_entry(file, segment)?);
    }
    let in_segments = |address: u64| {
        segments.iter().any(|s| {
            s.p_type == PT_LOAD && address.checked_sub(s.p_paddr).is_some_and(|offset| offset < s.p_filesz)
        })
    };
    let entry = match (pvh, entry) {
        (Some(address), _) if in_segments(address.into()) => Entry::Pvh(address),
        (Some(address), _) => {
            return Err(file.not_a_kernel(format!("its PVH entry {address:#x} is outside of its code")));
        }
        (None, Some(address)) => Entry::Linux64(address),
        (None, None) => {
            let address = header.e_entry;
            return Err(file.not_a_kernel(format!("its entry {address:#x} is outside of its code")));
        }
    };
    Ok(Kernel { entry, header: None, end, initrd_limit: INITRD_LIMIT, cmdline_limit: CMDLINE_LIMIT })
}

fn check_header(header: &Elf64_Ehdr) -> Result<(), String> {
    if header.e_ident[EI_CLASS] != CLASS_64
        || header.e_ident[EI_DATA] != LITTLE_ENDIAN
        || header.e_machine != EM_X86_64
    {
        return Err("is an ELF file for another kind of processor; an x86_64 kernel is needed".into());
    }
    if !matches!(header.e_type, ET_EXEC | ET_DYN) {
        return Err("is an ELF object or core file, not a kernel (a kernel is called vmlinux)".into());
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() || header.e_phnum > MAX_SEGMENTS {
        return Err("is a damaged ELF file: its program headers make no sense".into());
    }
    Ok(())
}

fn program_headers(file: &BootFile, head: &[u8], header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, BootError> {
    let size = usize::from(header.e_phnum) * size_of::<Elf64_Phdr>();
    let start = usize::try_from(header.e_phoff).unwrap_or(usize::MAX);
    let mut apart = vec![];
    let bytes = match start.checked_add(size).and_then(|end| head.get(start..end)) {
        Some(bytes) => bytes,
        None => {
            apart.resize(size, 0);
            let n = file.read_at(header.e_phoff, &mut apart)?;
            &apart[..n]
        }
    };
    if bytes.len() < size {
        return Err(file.not_a_kernel("is an ELF file cut short in its program headers: copy it again"));
    }
    let segments: Vec<Elf64_Phdr> = bytes.chunks_exact(size_of::<Elf64_Phdr>()).filter_map(read).collect();
    if !segments.iter().any(|s| s.p_type == PT_LOAD && s.p_filesz > 0) {
        return Err(file.not_a_kernel("is an ELF file with nothing to load"));
    }
    Ok(segments)
}

/// Returns one past the segment's last byte in guest memory.
fn check_segment(file: &BootFile, segment: &Elf64_Phdr) -> Result<u64, BootError> {
    if segment.p_filesz > segment.p_memsz {
        return Err(
            file.not_a_kernel("is a damaged ELF file: a segment is larger in the file than in memory")
        );
    }
    if segment.p_offset.checked_add(segment.p_filesz).is_none_or(|end| end > file.len()) {
        return Err(file.not_a_kernel("is an ELF file cut short: copy it again"));
    }
    if segment.p_paddr < HIGH_RAM_START {
        return Err(file.not_a_kernel(format!(
            "has a segment at {:#x}; memory below 1 MiB belongs to the machine's own tables",
            segment.p_paddr
        )));
    }
    Ok(segment.p_paddr.saturating_add(segment.p_memsz))
}

/// Looks for the PVH entry among the notes of a segment.
fn pvh_entry(file: &BootFile, segment: &Elf64_Phdr) -> Result<Option<u32>, BootError> {
    let mut notes = vec![0; segment.p_filesz.min(MAX_NOTES) as usize];
    let n = file.read_at(segment.p_offset, &mut notes)?;
    let align = if segment.p_align == 8 { 8 } else { 4 };
    Ok(find_note(&notes[..n], align))
}

fn find_note(mut notes: &[u8], align: usize) -> Option<u32> {
    let word = |bytes: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
    };
    loop {
        let (name_len, desc_len) = (word(notes, 0)? as usize, word(notes, 4)? as usize);
        let kind = word(notes, 8)?;
        let name = notes.get(12..)?.get(..name_len)?;
        let desc_at = 12usize.checked_add(name_len)?.checked_next_multiple_of(align)?;
        let desc = notes.get(desc_at..)?.get(..desc_len)?;
        if kind == NOTE_PVH_ENTRY && name == NOTE_OWNER {
            return word(desc, 0);
        }
        let next = desc_at.checked_add(desc_len)?.checked_next_multiple_of(align)?;
        notes = notes.get(next..)?;
    }
}

fn zero(memory: &GuestMemory, at: u64, len: u64) -> Result<(), BootError> {
    const CHUNK: u64 = 64 << 10;
    let zeroes = vec![0; CHUNK as usize];
    for offset in (0..len).step_by(CHUNK as usize) {
        let part = &zeroes[..CHUNK.min(len - offset) as usize];
        memory
            .write_slice(part, GuestAddress(at + offset))
            .map_err(|source| BootError::Memory { what: "the kernel's empty data", source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn note(owner: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut note = Vec::new();
        for n in [owner.len() as u32, desc.len() as u32, kind] {
            note.extend(n.to_le_bytes());
        }
        for part in [owner, desc] {
            note.extend(part);
            note.resize(note.len().next_multiple_of(4), 0);
        }
        note
    }

    #[test]
    fn finds_the_pvh_note_among_others() {
        let mut notes = note(b"GNU\0", 18, &[1; 20]);
        notes.extend(note(b"Xen\0", 6, b"linux\0"));
        notes.extend(note(b"Xen\0", 18, &0x0123_4567_u64.to_le_bytes()));
        assert_eq!(find_note(&notes, 4), Some(0x0123_4567));
        assert_eq!(find_note(&notes[..notes.len() - 8], 4), None);
    }

    proptest! {
        #[test]
        fn hostile_notes_end_the_search(notes in proptest::collection::vec(any::<u8>(), 0..200), wide: bool) {
            find_note(&notes, if wide { 8 } else { 4 });
        }
    }
}
