//! From a tape to a program: the layout of parameters, the lifetimes of temporaries, their places in the arena.

use super::program::{Bucket, Instruction, IoSlot, Kind, Lane, Program};
use super::record::{Home, Node, Tape};
use super::{Op, ParamLayout, Phase, Spec};
use crate::collective::Exchange;
use crate::device::{ALIGNMENT, DType, DeviceKind, Region, Slot, cuda};
use std::ops::Range;
use std::sync::Arc;

/// How gradients are cut into buckets for the sum over ranks, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buckets {
    /// Size of the first bucket, small so that communication starts early.
    pub first: usize,
    /// Size of the others …
    pub other: usize,
    /// … but for those into which as many bytes at the end are cut: what is complete before the end of the backward pass does not wait for
    /// what is not (the timestep projections, which gather over all blocks).
    pub tail: usize,
}

impl Default for Buckets {
    fn default() -> Self {
        Buckets { first: 1 << 20, other: 25 << 20, tail: 6 << 20 }
    }
}

/// How gradients become sums over all shards of the batch.
#[derive(Clone, Copy, Default)]
pub struct Reduction<'a> {
    /// The ranges that are summed over ranks, each as soon as it is complete.
    pub buckets: Buckets,
    /// Gives, for a bucket of so many elements, the op that goes before its sum over ranks: it changes the bucket in place and reads the same
    /// range of flat buffers 1, 2, … of [`Region::Gradients`], as many as it has inputs.
    pub before: Option<&'a dyn Fn(usize) -> Arc<dyn Op>>,
    /// Where buckets end: at multiples of so many elements, of which a flat buffer then has a multiple; 0: at parameters.
    pub granule: usize,
}

impl From<Buckets> for Reduction<'_> {
    fn from(buckets: Buckets) -> Self {
        Reduction { buckets, ..Reduction::default() }
    }
}

/// Plans `tape`. Parameters are placed by `layout`, or, if there is none, in the order in which their gradients are completed.
///
/// # Panics
/// If `layout` lacks a parameter of the tape.
pub fn plan(tape: &Tape, layout: Option<&ParamLayout>, reduction: Option<Reduction<'_>>) -> Program {
    let completed = gradient_completion(tape);
    let layout = layout.cloned().unwrap_or_else(|| {
        let mut order: Vec<usize> = (0..tape.params.len()).collect();
        order.sort_by_key(|&p| completed[p].unwrap_or(usize::MAX));
        ParamLayout::new(order.iter().map(|&p| &tape.params[p]))
    });
    let granule = reduction.map_or(1, |how| how.granule.max(1));
    let layout = layout.padded_to(granule);

    let (io, io_bytes) = place_io(tape);
    let (temporaries, scratch, arena_bytes) = place_arena(tape, layout.len());
    let flat = |number: usize| number * layout.len() * DType::F32.size();
    // A parameter may be read in another type than its own: then from its copy.
    let slot_of = |v: super::Var, spec: &Spec| -> Slot {
        let value = &tape.values[v.index()];
        let dtype = spec.dtype(tape.precision());
        let param = |id: usize| match layout.offset_of(&tape.params[id]) {
            Some(offset) => offset * DType::F32.size(),
            None => panic!("the layout lacks {}", tape.params[id].parts[0].name),
        };
        let (region, offset) = match &value.home {
            Home::Arena => (Region::Arena, temporaries[v.index()]),
            Home::Param(id) if dtype == DType::Bf16 => (Region::Compute, param(*id) / 2),
            Home::Param(id) => (Region::Weights, param(*id)),
            Home::GradientOf(id) => (Region::Gradients, flat(tape.gradients) + param(*id)),
            Home::Flat(region, number) => (*region, flat(*number)), // only gradients have several
            Home::Io(name) => match io.iter().find(|i| &i.name == name) {
                Some(io) => (Region::Io, io.slot.offset),
                None => panic!("no place for {name}"),
            },
        };
        Slot { region, offset, len: value.len(layout.len()), dtype }
    };
    let slots =
        |vars: &[super::Var], specs: &[Spec]| vars.iter().zip(specs).map(|(&v, spec)| slot_of(v, spec)).collect();

    let mut ends = reduction.map_or(vec![], |how| cut_buckets(tape, &layout, &completed, how.buckets, granule));
    ends.reverse(); // popped from the back, first completed first
    let mut started = Vec::new();
    let mut instructions = Vec::new();
    let comm = |kind| Instruction::communication(kind, Phase::Backward);
    for (id, node) in tape.nodes.iter().enumerate() {
        if node.phase == Phase::Update {
            instructions.extend(started.drain(..).map(|bucket| comm(Kind::Wait(bucket))));
        }
        let signature = node.op.signature();
        instructions.push(Instruction {
            kind: Kind::Launch(node.op.clone()),
            inputs: slots(&node.inputs, &signature.inputs),
            outputs: slots(&node.outputs, &signature.outputs),
            updates: node.updates,
            scratch: scratch[id],
            lane: Lane::Compute,
            phase: node.phase,
            label: node.label.clone(),
        });
        while let Some(bucket) = ends.pop_if(|bucket| bucket.complete_at <= id) {
            if let Some(before) = reduction.and_then(|how| how.before) {
                instructions.push(in_place(before(bucket.range.len()), &bucket.range, &layout));
            }
            let (number, exchange, region) = (started.len(), Exchange::AllReduce, Region::Gradients);
            let bucket = Bucket { number, exchange, region, range: bucket.range };
            instructions.push(comm(Kind::Start(bucket.clone())));
            started.push(bucket);
        }
    }
    instructions.extend(started.into_iter().map(|bucket| comm(Kind::Wait(bucket))));
    let thread_scratch = tape.nodes.iter().map(|n| n.op.scratch().thread).max().unwrap_or(0);
    Program { instructions, layout, io, io_bytes, arena_bytes, thread_scratch, target: tape.target }
}

/// `op` on a range of the gradients, which it changes, and of the flat buffers after them.
fn in_place(op: Arc<dyn Op>, range: &Range<usize>, layout: &ParamLayout) -> Instruction {
    let slot = |number: usize| Slot {
        region: Region::Gradients,
        offset: (number * layout.len() + range.start) * DType::F32.size(),
        len: range.len(),
        dtype: DType::F32,
    };
    Instruction {
        inputs: (1..=op.signature().inputs.len()).map(slot).collect(),
        kind: Kind::Launch(op),
        outputs: vec![slot(0)],
        updates: 1,
        scratch: None,
        lane: Lane::Compute,
        phase: Phase::Backward,
        label: String::new(),
    }
}

/// For each parameter the last node of the backward pass that writes to its gradient.
fn gradient_completion(tape: &Tape) -> Vec<Option<usize>> {
    let mut completed = vec![None; tape.params.len()];
    for (id, node) in tape.nodes.iter().enumerate() {
        for v in &node.outputs {
            if let Home::GradientOf(param) = tape.values[v.index()].home {
                completed[param] = Some(id);
            }
        }
    }
    completed
}

struct Cut {
    range: Range<usize>,
    complete_at: usize,
}

/// Contiguous ranges of the gradient buffer, cut at parameters or at the last multiple of `granule` before, with the node that completes each.
fn cut_buckets(
    tape: &Tape,
    layout: &ParamLayout,
    completed: &[Option<usize>],
    sizes: Buckets,
    granule: usize,
) -> Vec<Cut> {
    let mut params: Vec<(usize, usize)> =
        (0..tape.params.len()).filter_map(|p| Some((layout.offset_of(&tape.params[p])?, completed[p]?))).collect();
    params.sort();
    let mut buckets: Vec<Cut> = Vec::new();
    let mut start = 0;
    let mut complete_at = 0;
    for (i, &(_, at)) in params.iter().enumerate() {
        let end = params.get(i + 1).map_or(layout.len(), |next| next.0 / granule * granule);
        complete_at = complete_at.max(at);
        let left = (layout.len() - start) * DType::F32.size();
        let middle = sizes.other.min(left.saturating_sub(sizes.other));
        let limit = if buckets.is_empty() { sizes.first } else { middle.max(sizes.tail) };
        if end > start && ((end - start) * DType::F32.size() >= limit || end == layout.len()) {
            // A bucket starts after the one before it, so that every rank reduces in the same order.
            let after = buckets.last().map_or(0, |b| b.complete_at);
            complete_at = complete_at.max(after);
            buckets.push(Cut { range: start..end, complete_at });
            start = end;
        }
    }
    buckets
}

fn place_io(tape: &Tape) -> (Vec<IoSlot>, usize) {
    let mut io = Vec::new();
    let mut offset = 0usize;
    for value in &tape.values {
        if let (Home::Io(name), Some(shape)) = (&value.home, &value.shape) {
            let slot = Slot { region: Region::Io, offset, len: shape.len(), dtype: value.dtype };
            offset = (offset + slot.bytes()).next_multiple_of(ALIGNMENT);
            io.push(IoSlot { name: name.clone(), slot });
        }
    }
    (io, offset)
}

/// Something that needs a place in the arena from its first node to its last.
struct Tenant {
    first: usize,
    last: usize,
    bytes: usize,
}

/// Byte offsets of all values that live in the arena, workspaces of all nodes, and the size of the arena.
fn place_arena(tape: &Tape, flat: usize) -> (Vec<usize>, Vec<Option<Slot>>, usize) {
    let mut tenants: Vec<Tenant> = Vec::new();
    let mut tenant_of_value = vec![None; tape.values.len()];
    let touch = |tenants: &mut Vec<Tenant>, of: &mut Vec<Option<usize>>, v: super::Var, at: usize| {
        let value = &tape.values[v.index()];
        if value.home != Home::Arena {
            return;
        }
        match of[v.index()] {
            Some(t) => tenants[t].last = at,
            None => {
                of[v.index()] = Some(tenants.len());
                tenants.push(Tenant { first: at, last: at, bytes: value.len(flat) * value.dtype.size() });
            }
        }
    };
    let mut tenant_of_scratch = vec![None; tape.nodes.len()];
    for (id, Node { op, inputs, outputs, updates, .. }) in tape.nodes.iter().enumerate() {
        inputs.iter().chain(outputs).for_each(|&v| touch(&mut tenants, &mut tenant_of_value, v, id));
        let bytes = match tape.target.kind {
            DeviceKind::Cpu => op.scratch().arena * DType::F32.size(),
            DeviceKind::Cuda => op.cuda(&cuda::Form { precision: tape.precision(), updates: *updates, flat }).scratch,
        };
        if bytes > 0 {
            tenant_of_scratch[id] = Some((tenants.len(), bytes.div_ceil(DType::F32.size())));
            tenants.push(Tenant { first: id, last: id, bytes });
        }
    }
    let (offsets, size) = pack(&tenants);
    let values = tenant_of_value.iter().map(|t| t.map_or(0, |t| offsets[t])).collect();
    let scratch = tenant_of_scratch
        .iter()
        .map(|s| s.map(|(t, len)| Slot { region: Region::Arena, offset: offsets[t], len, dtype: DType::F32 }))
        .collect();
    (values, scratch, size)
}

/// Largest first, each at the lowest offset where no tenant of the same time stands.
fn pack(tenants: &[Tenant]) -> (Vec<usize>, usize) {
    let mut order: Vec<usize> = (0..tenants.len()).collect();
    order.sort_by_key(|&t| (std::cmp::Reverse(tenants[t].bytes), tenants[t].first));
    let mut offsets = vec![0; tenants.len()];
    let mut placed: Vec<usize> = Vec::new(); // in the order of their offsets
    let mut size = 0;
    for t in order {
        let mut offset = 0;
        for &other in &placed {
            let together = tenants[other].first <= tenants[t].last && tenants[t].first <= tenants[other].last;
            if together {
                if offset + tenants[t].bytes <= offsets[other] {
                    break;
                }
                offset = offset.max((offsets[other] + tenants[other].bytes).next_multiple_of(ALIGNMENT));
            }
        }
        offsets[t] = offset;
        size = size.max(offset + tenants[t].bytes);
        let at = placed.partition_point(|&other| offsets[other] <= offset);
        placed.insert(at, t);
    }
    (offsets, size.next_multiple_of(ALIGNMENT))
}
