//! The state of a run at one step, as it is saved.

use super::error::CheckpointError;
use super::layout::Layout;
use super::manifest::Meta;
use std::ops::Range;
use std::sync::Arc;

/// The four flat buffers of a run, in the order in which a shard holds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The f32 master weights.
    Params,
    /// Adam's first moment.
    AdamM,
    /// Adam's second moment.
    AdamV,
    /// The exponential moving average of the weights.
    Ema,
}

/// All groups, in file order.
pub const GROUPS: [Group; 4] = [Group::Params, Group::AdamM, Group::AdamV, Group::Ema];

impl Group {
    /// The name that precedes a tensor's own in a shard: `ema.conv_in.weight`.
    pub fn name(self) -> &'static str {
        match self {
            Group::Params => "params",
            Group::AdamM => "adam_m",
            Group::AdamV => "adam_v",
            Group::Ema => "ema",
        }
    }
}

/// A share of the four flat buffers, as it is recycled between saves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Buffers {
    /// The elements of the flat buffers that are meant. Each of the four has this many.
    pub range: Range<usize>,
    /// The f32 master weights.
    pub params: Vec<f32>,
    /// Adam's first moment.
    pub adam_m: Vec<f32>,
    /// Adam's second moment.
    pub adam_v: Vec<f32>,
    /// The exponential moving average of the weights.
    pub ema: Vec<f32>,
}

impl Buffers {
    /// Zeros for the elements `range`, each of them written: a system hands memory over when it is first written to, which takes longer than
    /// the copying that a training loop waits for.
    pub fn zeroed(range: Range<usize>) -> Buffers {
        let zeros = || {
            let mut zeros = Vec::with_capacity(range.len());
            // A known zero would come from the system unwritten.
            zeros.resize(range.len(), std::hint::black_box(0.0));
            zeros
        };
        Buffers { params: zeros(), adam_m: zeros(), adam_v: zeros(), ema: zeros(), range }
    }
}

/// The state after a step, or one rank's share of it: what a checkpoint is written from and read into.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Step, seed, hashes and what else is not a tensor.
    pub meta: Meta,
    /// Where the tensors stand in the four buffers.
    pub layout: Arc<Layout>,
    /// The elements of the flat buffers that are here: all of them, `0..layout.elements()`, in a snapshot that was loaded.
    pub range: Range<usize>,
    /// The f32 master weights. Empty in a snapshot that was loaded without them, as are the others.
    pub params: Vec<f32>,
    /// Adam's first moment.
    pub adam_m: Vec<f32>,
    /// Adam's second moment.
    pub adam_v: Vec<f32>,
    /// The exponential moving average of the weights.
    pub ema: Vec<f32>,
}

impl Snapshot {
    /// A snapshot that owns the given buffers.
    pub fn new(meta: Meta, layout: Arc<Layout>, buffers: Buffers) -> Snapshot {
        let Buffers { range, params, adam_m, adam_v, ema } = buffers;
        Snapshot { meta, layout, range, params, adam_m, adam_v, ema }
    }

    /// One of the four flat buffers, as far as it is here.
    pub fn group(&self, group: Group) -> &[f32] {
        match group {
            Group::Params => &self.params,
            Group::AdamM => &self.adam_m,
            Group::AdamV => &self.adam_v,
            Group::Ema => &self.ema,
        }
    }

    /// The elements of one tensor in one group; `None` where the group was not loaded, the name is unknown, or the tensor is not wholly here.
    pub fn tensor(&self, group: Group, name: &str) -> Option<&[f32]> {
        let Range { start, end } = self.layout.get(name)?.range();
        self.group(group).get(start.checked_sub(self.range.start)?..end.checked_sub(self.range.start)?)
    }

    /// Gives the buffers back.
    pub fn into_buffers(self) -> Buffers {
        let Snapshot { range, params, adam_m, adam_v, ema, .. } = self;
        Buffers { range, params, adam_m, adam_v, ema }
    }

    pub(super) fn group_mut(&mut self, group: Group) -> &mut Vec<f32> {
        match group {
            Group::Params => &mut self.params,
            Group::AdamM => &mut self.adam_m,
            Group::AdamV => &mut self.adam_v,
            Group::Ema => &mut self.ema,
        }
    }

    /// What is here must be shard `index` of `count`, in all four buffers.
    pub(super) fn check(&self, index: usize, count: usize) -> Result<(), CheckpointError> {
        let expected = self.layout.shard(index, count);
        if self.range != expected {
            return Err(CheckpointError::Share { expected, found: self.range.clone() });
        }
        for group in GROUPS {
            let found = self.group(group).len();
            if found != expected.len() {
                return Err(CheckpointError::Snapshot { group: group.name(), expected: expected.len(), found });
            }
        }
        Ok(())
    }
}
