//! Sums over ranks of one machine, in memory that they share.
//!
//! Every rank puts its part into a [`Span`] of its own window and says where that is. Rank r then adds up slice r of all parts, reading the
//! others' where they lie, and writes the result in place of its own slice; when all have said that they are done, everyone takes the
//! slices out of the windows. The sockets carry no more than these words, so a rank that is gone is noticed as fast as without.

use super::super::{CollectiveError, slice_of, sum_along_tree};
use super::mesh::Mesh;
use super::segment::{Span, View, Window};
use super::slice;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Floats that are added up at a time: a block of each of some ranks stays in a core's cache.
const BLOCK: usize = 4096;

/// A rank's window and its views of the others'.
#[derive(Clone, Debug)]
pub(super) struct Shared {
    pub rank: usize,
    pub window: Arc<Window>,
    /// One for each rank but this.
    views: Arc<Vec<Option<View>>>,
}

/// A part of a sum, and where the other ranks' are in their windows (bytes).
#[derive(Debug)]
pub(super) struct Part {
    pub span: Span,
    pub places: Vec<u64>,
}

impl Shared {
    /// Makes a window and exchanges it for the others'. Gives the reason where this cannot be; the others hear of it when they agree.
    pub fn exchange(mesh: &Mesh, patience: Duration) -> Result<Result<Shared, String>, CollectiveError> {
        let window = match &mesh.notice {
            Some(reason) => Err(reason.clone()),
            None => Window::create().map_err(|error| format!("no shared memory ({error})")),
        };
        let lost = |rank: usize| {
            move |error: io::Error| CollectiveError::PeerLost { rank, operation: format!("the meeting ({error})") }
        };
        let file = window.as_ref().ok().map(Window::file);
        let mut fault = window.as_ref().err().cloned();
        for other in mesh.others() {
            let stream = mesh.stream(other);
            match stream.pass(1, file) {
                Ok(()) => {}
                // A connection that carries no descriptors.
                Err(error) if file.is_some() => {
                    fault.get_or_insert_with(|| format!("its memory cannot be passed on ({error})"));
                    stream.pass(0, None).map_err(lost(other))?;
                }
                Err(error) => return Err(lost(other)(error)),
            }
        }
        let mut views = Vec::new();
        for peer in 0..mesh.size {
            let mut view = None;
            if peer != mesh.rank {
                let (_, file) = mesh.stream(peer).receive(patience).map_err(lost(peer))?;
                match file.map(View::of) {
                    Some(Ok(mapped)) => view = Some(mapped),
                    Some(Err(error)) => {
                        fault = fault.or(Some(format!("rank {peer}'s memory cannot be read ({error})")))
                    }
                    None => fault = fault.or(Some(format!("rank {peer} shares no memory"))),
                }
            }
            views.push(view);
        }
        Ok(match (window, fault) {
            (Ok(window), None) => Ok(Shared { rank: mesh.rank, window: Arc::new(window), views: Arc::new(views) }),
            (Err(reason), _) | (Ok(_), Some(reason)) => Err(reason),
        })
    }

    /// Copies numbers of a rank's part from float `first` on.
    fn read<T: bytemuck::Pod>(
        &self,
        peer: usize,
        part: &Part,
        first: usize,
        out: &mut [T],
    ) -> Result<(), CollectiveError> {
        let place = part.places[peer].checked_add((first * size_of::<f32>()) as u64);
        let view = self.views[peer].as_ref();
        match (place, view) {
            (Some(place), Some(view)) if view.read(place, out) => Ok(()),
            _ => Err(CollectiveError::OutOfStep {
                rank: peer,
                ours: format!("{} bytes inside its memory", part.span.len() * size_of::<f32>()),
                theirs: format!("byte {}", part.places[peer]),
            }),
        }
    }

    /// Adds up this rank's slice of all parts, in place of its own.
    pub fn sum(&self, part: &mut Part, blocks: &mut Vec<Vec<f32>>) -> Result<(), CollectiveError> {
        let size = self.views.len();
        let mine = slice(part.span.len(), self.rank, size);
        blocks.resize(size, Vec::new());
        for start in mine.clone().step_by(BLOCK) {
            let at = start..(start + BLOCK).min(mine.end);
            for (peer, block) in blocks.iter_mut().enumerate() {
                block.resize(at.len(), 0.0);
                if peer == self.rank {
                    block.copy_from_slice(&part.span.floats()[at.clone()]);
                } else {
                    self.read(peer, part, at.start, block)?;
                }
            }
            sum_along_tree(blocks);
            part.span.floats_mut()[at].copy_from_slice(&blocks[0]);
        }
        Ok(())
    }

    /// Copies the sum out of all windows.
    pub fn take(&self, part: &Part, out: &mut [f32]) -> Result<(), CollectiveError> {
        let size = self.views.len();
        for peer in 0..size {
            let at = slice(out.len(), peer, size);
            if peer == self.rank {
                out[at.clone()].copy_from_slice(&part.span.floats()[at]);
            } else {
                self.read(peer, part, at.start, &mut out[at])?;
            }
        }
        Ok(())
    }

    /// Copies the other ranks' slices out of their windows: a part is no more than its rank's slice.
    pub fn take_slices(&self, part: &Part, out: &mut [u8]) -> Result<(), CollectiveError> {
        let size = self.views.len();
        for peer in (0..size).filter(|peer| *peer != self.rank) {
            let at = slice_of(&(0..out.len()), peer, size);
            self.read(peer, part, 0, &mut out[at])?;
        }
        Ok(())
    }
}
