use super::{Op, Param, Part, Shape, Spec};
use crate::device::{DType, DeviceKind, Precision, Region, Target};
use std::sync::Arc;

/// A value on a tape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Var(pub(super) u32);

impl Var {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// Where a value lives.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Home {
    /// In the arena, between its first write and its last use.
    Arena,
    /// In the flat buffer of parameters.
    Param(usize),
    /// At a parameter's place in the flat buffer of gradients that the tape writes to.
    GradientOf(usize),
    /// A whole flat buffer: which one of those that stand one after another in the region.
    Flat(Region, usize),
    /// Known to the host by name.
    Io(String),
}

#[derive(Clone, Debug)]
pub(super) struct Value {
    /// None of what is as long as a flat buffer, or has one for each `block` elements of it.
    pub shape: Option<Shape>,
    pub block: usize,
    pub dtype: DType,
    pub home: Home,
    /// Whether it depends on a parameter.
    pub differentiable: bool,
}

impl Value {
    /// Elements, where flat buffers have so many.
    pub fn len(&self, flat: usize) -> usize {
        self.shape.as_ref().map_or(flat.div_ceil(self.block), Shape::len)
    }
}

/// The part of a step an op belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// From the inputs to the loss.
    Forward,
    /// From the loss to the gradients.
    Backward,
    /// From the gradients to the new parameters.
    Update,
}

impl Phase {
    /// Name in listings.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Forward => "forward",
            Phase::Backward => "backward",
            Phase::Update => "update",
        }
    }
}

/// An op on the tape. `updates` has bit i set where output i is added to or changed in place.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub op: Arc<dyn Op>,
    pub inputs: Vec<Var>,
    pub outputs: Vec<Var>,
    pub updates: u32,
    pub phase: Phase,
    pub label: String,
}

/// A trace of ops over values.
#[derive(Debug)]
pub struct Tape {
    pub(super) values: Vec<Value>,
    pub(super) nodes: Vec<Node>,
    pub(super) params: Vec<Param>,
    pub(super) phase: Phase,
    pub(super) gradients: usize,
    pub(super) target: Target,
    scope: Vec<String>,
}

impl Default for Tape {
    fn default() -> Self {
        Tape::on(Target::default())
    }
}

impl Tape {
    /// An empty tape of a program for CPU cores.
    pub fn new() -> Tape {
        Tape::default()
    }

    /// An empty tape of a program for `target`.
    pub fn on(target: Target) -> Tape {
        let (values, nodes, params, scope) = (vec![], vec![], vec![], vec![]);
        Tape { values, nodes, params, phase: Phase::Forward, gradients: 0, target, scope }
    }

    /// What activations are.
    pub fn precision(&self) -> Precision {
        self.target.precision
    }

    /// Channels that images of `channels` have for the first and the last convolution: tensor cores take eight at a time.
    pub fn padded(&self, channels: usize) -> usize {
        match (self.target.kind, self.target.precision) {
            (DeviceKind::Cuda, Precision::Bf16) => channels.next_multiple_of(8),
            _ => channels,
        }
    }

    /// Runs `body` with `name` added to the path that names params and labels ops.
    pub fn scope<R>(&mut self, name: impl Into<String>, body: impl FnOnce(&mut Tape) -> R) -> R {
        self.scope.push(name.into());
        let result = body(self);
        self.scope.pop();
        result
    }

    /// `name` with the present scope before it.
    pub fn path(&self, name: &str) -> String {
        let mut path = self.scope.join(".");
        if !path.is_empty() && !name.is_empty() {
            path.push('.');
        }
        path + name
    }

    /// A parameter `name` under the present scope.
    pub fn param(&mut self, name: &str, shape: impl Into<Shape>) -> Var {
        let shape = shape.into();
        let part = Part { name: self.path(name), shape: shape.clone() };
        self.fused_param(shape, vec![part])
    }

    /// Several parameters that ops read as one: `parts` (full names) stand one after another without a gap, and their elements make up
    /// `shape`.
    pub fn fused_param(&mut self, shape: impl Into<Shape>, parts: Vec<Part>) -> Var {
        let shape = shape.into();
        assert_eq!(shape.len(), parts.iter().map(|p| p.shape.len()).sum::<usize>(), "parts of {shape}");
        self.params.push(Param { shape: shape.clone(), parts });
        self.value(Some(shape), DType::F32, Home::Param(self.params.len() - 1), true)
    }

    /// The parameters in the order in which they were asked for.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// A value that the host writes before a run or reads after it.
    pub fn io(&mut self, name: &str, spec: Spec) -> Var {
        assert!(
            !self.values.iter().any(|v| v.home == Home::Io(name.into())),
            "the tape has an input or output named {name} already"
        );
        let dtype = spec.dtype(self.precision());
        self.value(spec.shape, dtype, Home::Io(name.into()), false)
    }

    /// Makes a temporary known to the host by `name`, to be read after a run.
    pub fn publish(&mut self, var: Var, name: &str) {
        let value = &mut self.values[var.index()];
        assert_eq!(value.home, Home::Arena, "only a temporary can be published");
        value.home = Home::Io(name.into());
    }

    /// All of a flat buffer.
    pub fn flat(&mut self, region: Region) -> Var {
        self.flat_number(region, 0)
    }

    /// All of flat buffer `number` of a region that holds several one after another.
    pub fn flat_number(&mut self, region: Region, number: usize) -> Var {
        let dtype = if region == Region::Compute { DType::Bf16 } else { DType::F32 };
        self.value(None, dtype, Home::Flat(region, number), false)
    }

    /// A temporary that has one for each `block` elements of a flat buffer.
    pub fn of_blocks(&mut self, block: usize, dtype: DType) -> Var {
        let var = self.value(None, dtype, Home::Arena, false);
        self.values[var.index()].block = block;
        var
    }

    /// What stands at the beginning of a region for the whole run.
    pub fn held(&mut self, region: Region, spec: Spec) -> Var {
        let dtype = spec.dtype(self.precision());
        self.value(spec.shape, dtype, Home::Flat(region, 0), false)
    }

    /// Says to which of the flat buffers of [`Region::Gradients`] the gradients of parameters are written; 0 if nothing is said.
    pub fn write_gradients_to(&mut self, number: usize) {
        self.gradients = number;
    }

    /// A temporary of the given shape.
    pub(super) fn temporary(&mut self, shape: Shape, dtype: DType, differentiable: bool) -> Var {
        self.value(Some(shape), dtype, Home::Arena, differentiable)
    }

    pub(super) fn value(&mut self, shape: Option<Shape>, dtype: DType, home: Home, differentiable: bool) -> Var {
        self.values.push(Value { shape, block: 1, dtype, home, differentiable });
        Var(self.values.len() as u32 - 1)
    }

    /// Shape of a value.
    ///
    /// # Panics
    /// If the value is a flat buffer, whose length is known only after planning.
    pub fn shape(&self, var: Var) -> &Shape {
        match &self.values[var.index()].shape {
            Some(shape) => shape,
            None => panic!("a flat buffer has no shape before planning"),
        }
    }

    /// Puts `op` on the tape; its outputs are new temporaries.
    ///
    /// # Panics
    /// If the inputs do not have the shapes that the op was made for.
    pub fn push(&mut self, op: impl Op, inputs: &[Var]) -> Vec<Var> {
        let differentiable = inputs.iter().any(|v| self.values[v.index()].differentiable);
        let outputs: Vec<Var> = op
            .signature()
            .outputs
            .into_iter()
            .map(|spec| {
                let Some(shape) = spec.shape else { panic!("{}: an output temporary needs a shape", op.name()) };
                let dtype = spec.elements.dtype(self.precision());
                self.temporary(shape, dtype, differentiable && matches!(dtype, DType::F32 | DType::Bf16))
            })
            .collect();
        self.push_into(Arc::new(op), inputs, &outputs, 0);
        outputs
    }

    /// Puts an op with one output on the tape.
    pub fn push1(&mut self, op: impl Op, inputs: &[Var]) -> Var {
        let outputs = self.push(op, inputs);
        assert_eq!(outputs.len(), 1, "an op with one output");
        outputs[0]
    }

    /// Puts `op` on the tape so that it writes to existing values; bit i of `updates` says that it changes output i in place.
    ///
    /// # Panics
    /// If an operand does not have the shape that the op was made for.
    pub fn push_into(&mut self, op: Arc<dyn Op>, inputs: &[Var], outputs: &[Var], updates: u32) {
        let signature = op.signature();
        for (kind, vars, specs) in [("input", inputs, &signature.inputs), ("output", outputs, &signature.outputs)] {
            assert_eq!(vars.len(), specs.len(), "{}: number of {kind}s", op.name());
            for (i, (var, spec)) in vars.iter().zip(specs).enumerate() {
                let value = &self.values[var.index()];
                let dtype = spec.dtype(self.precision());
                // Of a parameter there is a copy in bf16 (`Region::Compute`).
                let is_copied = dtype == DType::Bf16 && kind == "input" && matches!(value.home, Home::Param(_));
                let is_as_long = match &spec.shape {
                    None => value.shape.is_some() || spec.block == value.block,
                    shape => *shape == value.shape,
                };
                let fits = (dtype == value.dtype || is_copied) && is_as_long;
                assert!(fits, "{}: {kind} {i} is {:?}, expected {spec:?}", op.name(), (&value.shape, value.dtype));
            }
        }
        let label = self.path("");
        let phase = self.phase;
        self.nodes.push(Node { op, inputs: inputs.to_vec(), outputs: outputs.to_vec(), updates, phase, label });
    }

    /// Says that the ops that follow belong to another part of the step.
    pub fn begin(&mut self, phase: Phase) {
        self.phase = phase;
    }
}
