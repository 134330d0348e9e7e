//! An image and what lies under it, as one disk: owns where each byte of the disk is found, and the slow way to read and write it.
//!
//! Layers are what the configuration says, top first; the top one alone is written. Names in headers are never opened.

use std::io;
use std::os::fd::AsRawFd;

use super::store::Store;
use super::{Found, Image};
use crate::block::{Problem, SECTOR};

pub(in crate::block) enum Layer {
    Qcow2(Box<Image>),
    /// Of so many bytes.
    Raw(Store),
}

/// Where a piece of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Zeroes,
    /// In the file of this descriptor, at this offset.
    File(i32, u64),
    /// In a compressed cluster of this layer.
    Compressed(usize, u64),
}

pub(crate) struct Stack {
    layers: Vec<Layer>,
    /// One cluster of the top image, for the slow ways.
    scratch: Vec<u8>,
    /// The compressed cluster that was unpacked last: layer, entry and content.
    unpacked: Option<(usize, u64)>,
    content: Vec<u8>,
}

impl Layer {
    /// A qcow2 image; `caches`: bytes for L2 tables and for refcount blocks.
    pub(in crate::block) fn qcow2(
        store: Store,
        write: bool,
        caches: (Option<u64>, Option<u64>),
    ) -> Result<Self, Problem> {
        Ok(Self::Qcow2(Box::new(Image::open(store, write, caches.0, caches.1)?)))
    }

    /// A raw image under another one.
    pub(in crate::block) fn raw(store: Store) -> Self {
        Self::Raw(store)
    }

    fn find(&mut self, offset: u64, len: u64) -> io::Result<(Found, u64)> {
        match self {
            Self::Qcow2(image) => image.find(offset, len),
            Self::Raw(store) => match store.len().saturating_sub(offset) {
                0 => Ok((Found::Zeroes, len)),
                there => Ok((Found::Data { at: offset, copied: false }, len.min(there))),
            },
        }
    }

    fn store(&mut self) -> &mut Store {
        match self {
            Self::Qcow2(image) => image.store(),
            Self::Raw(store) => store,
        }
    }
}

impl Stack {
    /// `layers`: the top one is qcow2. Checks that each header's backing name has a layer under it.
    pub(in crate::block) fn new(layers: Vec<Layer>) -> Result<Self, Problem> {
        for (at, layer) in layers.iter().enumerate() {
            let last = at + 1 == layers.len();
            match layer {
                Layer::Qcow2(image) => {
                    if let Some(name) = image.backing_name().filter(|_| last) {
                        return Err(super::FormatError::Backing(name.to_owned()).into());
                    }
                }
                Layer::Raw(_) if !last => {
                    return Err(Problem::Unsupported("a backing file under a raw image", "take it away"));
                }
                Layer::Raw(_) => {}
            }
        }
        let mut stack = Self { layers, scratch: Vec::new(), unpacked: None, content: Vec::new() };
        let cluster = stack.top()?.cluster();
        stack.scratch = vec![0; cluster as usize];
        Ok(stack)
    }

    fn top(&mut self) -> Result<&mut Image, Problem> {
        match self.layers.first_mut() {
            Some(Layer::Qcow2(image)) => Ok(image),
            _ => Err(Problem::Unsupported("a raw image here", "say format=raw")),
        }
    }

    fn image(&mut self) -> io::Result<&mut Image> {
        self.top().map_err(io::Error::other)
    }

    /// Bytes of the disk, and of a cluster.
    pub(in crate::block) fn geometry(&self) -> (u64, u64) {
        match self.layers.first() {
            Some(Layer::Qcow2(image)) => (image.size() - image.size() % SECTOR, image.cluster()),
            _ => (0, SECTOR),
        }
    }

    pub(super) fn locate(&mut self, offset: u64, len: u64) -> io::Result<(Place, u64)> {
        let mut len = len;
        for (at, layer) in self.layers.iter_mut().enumerate() {
            let (found, run) = layer.find(offset, len)?;
            len = run;
            match found {
                Found::Nothing => {}
                Found::Zeroes => return Ok((Place::Zeroes, len)),
                Found::Data { at, .. } => {
                    return Ok((Place::File(layer.store().file().as_raw_fd(), at), len));
                }
                Found::Compressed(entry) => return Ok((Place::Compressed(at, entry), len)),
            }
        }
        Ok((Place::Zeroes, len))
    }

    /// The part of a compressed cluster from `offset` of the disk on.
    pub(super) fn unpack(&mut self, layer: usize, entry: u64, offset: u64) -> io::Result<&[u8]> {
        let Some(Layer::Qcow2(image)) = self.layers.get_mut(layer) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let cluster = image.cluster();
        if self.unpacked != Some((layer, entry)) {
            self.unpacked = None;
            self.content.resize(cluster as usize, 0);
            image.read_compressed(entry, &mut self.content)?;
            self.unpacked = Some((layer, entry));
        }
        Ok(&self.content[(offset & (cluster - 1)) as usize..])
    }

    /// Reads, waiting for the file.
    pub(in crate::block) fn read(&mut self, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let mut found = (Found::Nothing, buffer.len() as u64);
            let mut layer = 0;
            while let Some(l) = self.layers.get_mut(layer) {
                found = l.find(offset, found.1)?;
                if found.0 != Found::Nothing {
                    break;
                }
                layer += 1;
            }
            let (piece, rest) = buffer.split_at_mut(found.1 as usize);
            match found.0 {
                Found::Nothing | Found::Zeroes => piece.fill(0),
                Found::Data { at, .. } => {
                    let layer = self.layers.get_mut(layer).ok_or(io::ErrorKind::NotFound)?;
                    layer.store().read(at, piece)?;
                }
                Found::Compressed(entry) => {
                    let from = self.unpack(layer, entry, offset)?;
                    let n = piece.len();
                    piece.copy_from_slice(from.get(..n).ok_or(io::ErrorKind::InvalidData)?);
                }
            }
            offset += piece.len() as u64;
            buffer = rest;
        }
        Ok(())
    }

    /// Where `offset` may be written in place, and for how many of `len` bytes; `None`: it needs a place first.
    pub(super) fn locate_own(&mut self, offset: u64, len: u64) -> io::Result<Result<(i32, u64, u64), u64>> {
        let image = self.image()?;
        match image.find(offset, len)? {
            (Found::Data { at, copied: true }, run) => Ok(Ok((image.store().file().as_raw_fd(), at, run))),
            (_, run) => Ok(Err(run)),
        }
    }

    /// Writes `len` bytes that `give` fills in piece by piece, in order, waiting for the file.
    pub(in crate::block) fn write(
        &mut self,
        mut offset: u64,
        mut len: u64,
        mut give: impl FnMut(&mut [u8]),
    ) -> io::Result<()> {
        let (_, cluster) = self.geometry();
        // Taken out, so that the rest of the stack can be used beside it.
        let mut buffer = std::mem::take(&mut self.scratch);
        let mut result = Ok(());
        while len > 0 && result.is_ok() {
            let inside = offset & (cluster - 1);
            let n = len.min(cluster - inside);
            result = self.write_cluster(offset, n, &mut buffer, &mut give);
            offset += n;
            len -= n;
        }
        self.scratch = buffer;
        result
    }

    /// `n` bytes at `offset`, inside one cluster; `buffer` has room for one.
    fn write_cluster(
        &mut self,
        offset: u64,
        n: u64,
        buffer: &mut [u8],
        give: &mut impl FnMut(&mut [u8]),
    ) -> io::Result<()> {
        let (_, cluster) = self.geometry();
        let (inside, end) =
            ((offset & (cluster - 1)) as usize, (offset & (cluster - 1)) as usize + n as usize);
        let image = self.image()?;
        if let (Found::Data { at, copied: true }, run) = image.find(offset, n)?
            && run == n
        {
            give(&mut buffer[..n as usize]);
            return image.write_in_place(at, &buffer[..n as usize]);
        }
        let start = offset - inside as u64;
        self.read(start, &mut buffer[..inside])?;
        give(&mut buffer[inside..end]);
        self.read(offset + n, &mut buffer[end..])?;
        self.image()?.put_cluster(start, buffer)
    }

    /// Makes a range read as zeroes; `unmap`: its place in the file may go. Parts of clusters are written.
    pub(in crate::block) fn zero(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.each_cluster(offset, len, |stack, at, n, whole| {
            if stack.locate(at, n)? == (Place::Zeroes, n) {
                return Ok(());
            }
            let over = stack.layers.len() > 1;
            if whole && stack.image()?.zero_cluster(at, over, !unmap)? {
                return Ok(());
            }
            stack.write(at, n, |bytes| bytes.fill(0))
        })
    }

    /// Gives whole clusters of a range back. They read as zeroes then, unless the image cannot say so.
    pub(in crate::block) fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.each_cluster(offset, len, |stack, at, _, whole| {
            if whole {
                let over = stack.layers.len() > 1;
                let image = stack.image()?;
                // False: older images cannot, with something under them. It was only an offer.
                image.zero_cluster(at, over, false)?;
            }
            Ok(())
        })
    }

    /// Calls `work(offset, length, whether that is a whole cluster)`. Stretches where there is nothing at all are left out.
    fn each_cluster(
        &mut self,
        mut offset: u64,
        len: u64,
        mut work: impl FnMut(&mut Self, u64, u64, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let (size, cluster) = self.geometry();
        let end = offset.checked_add(len).filter(|e| *e <= size).ok_or(io::ErrorKind::InvalidInput)?;
        while offset < end {
            if self.layers.len() == 1
                && let (Found::Nothing, run) = self.image()?.find(offset, end - offset)?
            {
                offset += run;
                continue;
            }
            let n = (cluster - (offset & (cluster - 1))).min(end - offset);
            // The last cluster of the disk may be cut off by its end.
            let whole = offset & (cluster - 1) == 0 && (n == cluster || offset + n == size);
            work(self, offset, n, whole)?;
            offset += n;
        }
        Ok(())
    }

    pub(super) fn is_dirty(&mut self) -> bool {
        self.image().is_ok_and(|image| image.is_dirty())
    }

    /// Makes everything durable; see [`Image::flush`].
    pub(in crate::block) fn flush(&mut self, quiet: bool) -> io::Result<()> {
        self.image()?.flush(quiet)
    }
}
