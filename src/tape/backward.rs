use super::record::{Home, Node};
use super::{Op, Phase, Tape, Var};
use std::sync::Arc;

/// Which gradient an output of a gradient op is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    /// All of the gradient of input i.
    Input(usize),
    /// Some columns of the gradient of input i; other ops write the others, none writes a column twice.
    ColumnsOf(usize),
}

/// Gradients of the loss with respect to the values of a tape, as far as they are known.
struct Gradients {
    of: Vec<Option<Var>>,
    /// Whether a gradient is written column by column; contributions to all of it cannot join those.
    by_columns: Vec<bool>,
}

impl Tape {
    /// Differentiates the tape: `gradient` is the gradient of the loss with respect to `output`. Returns nothing: the gradients of
    /// parameters stand in the flat gradient buffer when the program has run.
    pub fn backward(&mut self, output: Var, gradient: Var) {
        self.phase = Phase::Backward;
        let (of, by_columns) = (vec![None; self.values.len()], vec![false; self.values.len()]);
        let mut gradients = Gradients { of, by_columns };
        gradients.of[output.index()] = Some(gradient);
        for id in (0..self.nodes.len()).rev() {
            let node = self.nodes[id].clone();
            let differentiable = node.inputs.iter().any(|v| self.values[v.index()].differentiable);
            let reached = node.outputs.iter().any(|v| gradients.of[v.index()].is_some());
            if differentiable && reached {
                let op = Arc::clone(&node.op);
                op.gradient(&mut Gradient { tape: self, gradients: &mut gradients, node });
            }
        }
    }
}

/// The view that [`Op::gradient`] gets of its node and of the gradients known so far.
pub struct Gradient<'t> {
    tape: &'t mut Tape,
    gradients: &'t mut Gradients,
    node: Node,
}

impl Gradient<'_> {
    /// Input `i` of the op.
    pub fn input(&self, i: usize) -> Var {
        self.node.inputs[i]
    }

    /// Output `i` of the op.
    pub fn output(&self, i: usize) -> Var {
        self.node.outputs[i]
    }

    /// The gradient of the loss with respect to output `i`.
    ///
    /// # Panics
    /// If the loss does not depend on that output.
    pub fn of_output(&self, i: usize) -> Var {
        match self.gradients.of[self.node.outputs[i].index()] {
            Some(var) => var,
            None => panic!("{}: the loss does not depend on output {i}", self.node.op.name()),
        }
    }

    /// Whether the gradient of input `i` is of use: whether it depends on a parameter.
    pub fn wants(&self, i: usize) -> bool {
        self.tape.values[self.node.inputs[i].index()].differentiable
    }

    /// Puts `op` on the tape; its outputs are the gradients that `of` names. Where a gradient has a contribution already, the op adds
    /// to it.
    ///
    /// # Panics
    /// If some ops write columns of a gradient and others all of it: the sum would miss columns that are not written yet.
    pub fn emit(&mut self, op: impl Op, inputs: &[Var], of: &[Of]) {
        let specs = op.signature().outputs;
        let mut outputs = Vec::with_capacity(of.len());
        let mut updates = 0;
        for (k, target) in of.iter().enumerate() {
            let (input, columns) = match *target {
                Of::Input(i) => (i, false),
                Of::ColumnsOf(i) => (i, true),
            };
            let forward = self.node.inputs[input];
            let by_columns = &mut self.gradients.by_columns[forward.index()];
            let var = match self.gradients.of[forward.index()] {
                Some(var) => {
                    assert_eq!(*by_columns, columns, "{}: a gradient by columns and as a whole", op.name());
                    updates |= u32::from(!columns) << k;
                    var
                }
                None => {
                    let value = &self.tape.values[forward.index()];
                    *by_columns = columns;
                    let home = match value.home {
                        Home::Param(id) => Home::GradientOf(id),
                        _ => Home::Arena,
                    };
                    // As the op gives it: of weights that are read in bf16 it is f32.
                    let dtype = specs[k].dtype(self.tape.precision());
                    let var = self.tape.value(value.shape.clone(), dtype, home, false);
                    self.gradients.of[forward.index()] = Some(var);
                    var
                }
            };
            outputs.push(var);
        }
        let label = std::mem::take(&mut self.node.label);
        self.tape.scope(label.clone(), |tape| tape.push_into(Arc::new(op), inputs, &outputs, updates));
        self.node.label = label;
    }

    /// Makes the gradient of output 0 the gradient of input `i` without a copy, if that has no contribution yet; otherwise returns
    /// false and the op must emit an addition.
    ///
    /// To be called last, and once at most: later ops may add to this gradient in place, so nothing that reads the gradient of the output
    /// may follow.
    #[must_use]
    pub fn pass_through(&mut self, i: usize) -> bool {
        let dy = self.of_output(0);
        let (output, input) = (self.node.outputs[0].index(), self.node.inputs[i].index());
        let slot = &mut self.gradients.of[self.node.inputs[i].index()];
        let is_free = slot.is_none() && !matches!(self.tape.values[self.node.inputs[i].index()].home, Home::Param(_));
        if is_free {
            *slot = Some(dy);
            self.gradients.by_columns[input] = self.gradients.by_columns[output];
        }
        is_free
    }
}
