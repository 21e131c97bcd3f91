//! The state of a run at one step, as it is saved.

use super::error::CheckpointError;
use super::layout::Layout;
use super::manifest::Meta;
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

/// The four flat buffers alone, as they are recycled between saves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Buffers {
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
    /// Four buffers of `elements` zeros.
    pub fn zeroed(elements: usize) -> Buffers {
        let zeros = || vec![0.0; elements];
        Buffers { params: zeros(), adam_m: zeros(), adam_v: zeros(), ema: zeros() }
    }
}

/// The state after a step: what a checkpoint is written from and read into.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Step, seed, hashes and what else is not a tensor.
    pub meta: Meta,
    /// Where the tensors stand in the four buffers.
    pub layout: Arc<Layout>,
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
        let Buffers { params, adam_m, adam_v, ema } = buffers;
        Snapshot { meta, layout, params, adam_m, adam_v, ema }
    }

    /// One of the four flat buffers.
    pub fn group(&self, group: Group) -> &[f32] {
        match group {
            Group::Params => &self.params,
            Group::AdamM => &self.adam_m,
            Group::AdamV => &self.adam_v,
            Group::Ema => &self.ema,
        }
    }

    /// The elements of one tensor in one group; `None` where the group was not loaded or the name is unknown.
    pub fn tensor(&self, group: Group, name: &str) -> Option<&[f32]> {
        self.group(group).get(self.layout.get(name)?.range())
    }

    /// Gives the buffers back.
    pub fn into_buffers(self) -> Buffers {
        Buffers { params: self.params, adam_m: self.adam_m, adam_v: self.adam_v, ema: self.ema }
    }

    pub(super) fn group_mut(&mut self, group: Group) -> &mut Vec<f32> {
        match group {
            Group::Params => &mut self.params,
            Group::AdamM => &mut self.adam_m,
            Group::AdamV => &mut self.adam_v,
            Group::Ema => &mut self.ema,
        }
    }

    /// All four buffers must have the layout's length.
    pub(super) fn check(&self) -> Result<(), CheckpointError> {
        let expected = self.layout.elements();
        for group in GROUPS {
            let found = self.group(group).len();
            if found != expected {
                return Err(CheckpointError::Snapshot { group: group.name(), expected, found });
            }
        }
        Ok(())
    }
}
