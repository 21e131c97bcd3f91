//! The bf16 copy of all weights that products of a bf16 program read. [`adam_ema`](super::adam_ema) keeps it up to date; this makes it anew
//! where weights come from elsewhere.

mod cpu;
mod cuda;

use crate::collective::Solo;
use crate::device::cpu::Launch;
use crate::device::cuda::{Form, Work};
use crate::device::{Binding, Device, DeviceError, Precision, Region};
use crate::tape::{Op, ParamLayout, Program, RunError, Signature, Spec, Tape, plan};
use std::sync::Arc;

/// Input: all weights, f32. Output: the same in bf16, rounded to nearest, ties to even.
#[derive(Clone, Debug)]
pub struct Cast;

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }

    fn signature(&self) -> Signature {
        Signature { inputs: vec![Spec::flat()], outputs: vec![Spec::flat_bf16()] }
    }

    fn flops(&self) -> u64 {
        0
    }

    fn cpu(&self, launch: &Launch<'_>) {
        cpu::cast(launch.pool(), launch.input(0), launch.output(0));
    }

    fn cuda(&self, form: &Form) -> Work {
        Work::kernels([cuda::launch(form.flat)])
    }
}

pub(super) use cpu::cast;

/// Makes the bf16 copy of a program's weights.
pub struct ComputeCopy {
    program: Arc<Program>,
}

impl ComputeCopy {
    /// Puts memory for the copy behind [`Region::Compute`], if `program` computes in bf16; else there is none.
    ///
    /// # Errors
    /// Too little memory on the device.
    pub fn new(
        device: &mut Device,
        program: &Program,
        binding: &mut Binding,
    ) -> Result<Option<ComputeCopy>, DeviceError> {
        if program.target.precision == Precision::F32 {
            return Ok(None);
        }
        let buffer = device.allocate(program.layout.len() * Precision::Bf16.bytes())?;
        *binding = binding.with(Region::Compute, buffer);
        let mut tape = Tape::on(program.target);
        let (weights, copy) = (tape.flat(Region::Weights), tape.flat(Region::Compute));
        tape.push_into(Arc::new(Cast), &[weights], &[copy], 0);
        let layout: &ParamLayout = &program.layout;
        Ok(Some(ComputeCopy { program: Arc::new(plan(&tape, Some(layout), None)) }))
    }

    /// Makes it of the weights as they are now.
    ///
    /// # Errors
    /// The device's.
    pub fn refresh(&self, device: &mut Device, binding: &Binding) -> Result<(), RunError> {
        self.program.load(device, *binding)?.run(device, &mut Solo)
    }
}
