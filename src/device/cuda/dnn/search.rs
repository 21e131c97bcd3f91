//! The fastest plan that computes what it should: candidates are timed on the GPU, and the first of them that passes a test is taken.

use super::Dnn;
use super::form::{Form, Tensor, elements, output_of};
use super::plan::{ConvolutionAddresses, ConvolutionPlan, PlanChoice, PreparedConvolution};
use super::sample::{Patterns, Scrutiny, fault, precision_of};
use crate::device::cuda::{ConvolutionShape, CudaError, Gpu, Memory};
use std::time::Duration;

/// Plans of a form that are timed, at most: cuDNN proposes dozens, and the fastest is among its first.
const MOST: usize = 10;

impl Dnn {
    /// The fastest plan that may be used, needs at most `limit` bytes of workspace and gives the right result, twice the same bits. Takes
    /// memory for the convolution's tensors and the workspace, and gives it back.
    ///
    /// # Errors
    /// There is none, too little memory, or cuDNN fails.
    pub fn search(&self, gpu: &mut Gpu, shape: &ConvolutionShape, limit: usize) -> Result<ConvolutionPlan, CudaError> {
        let mut refusals = Vec::new();
        for forms in Form::all(shape) {
            let mut found = Vec::new();
            for form in forms {
                found.extend(self.fastest(gpu, shape, form, limit, &mut refusals)?);
            }
            if let Some(plan) = found.into_iter().min_by_key(ConvolutionPlan::time) {
                return Ok(plan);
            }
        }
        Err(self.no_plan(shape, refusals))
    }

    fn fastest(
        &self,
        gpu: &mut Gpu,
        shape: &ConvolutionShape,
        form: Form,
        limit: usize,
        refusals: &mut Vec<String>,
    ) -> Result<Option<ConvolutionPlan>, CudaError> {
        let plans = self.plans(shape, form, limit, MOST, refusals)?;
        if plans.is_empty() {
            return Ok(None);
        }
        let mut bench = Bench::new(shape, form);
        let found = bench.fastest(gpu, plans, refusals);
        // Both errors are the GPU's; the first says more.
        let given_back = bench.give_back(gpu);
        let found = found?;
        given_back?;
        Ok(found)
    }

    /// What is wrong with a plan that was found before: it does not run, or computes something else.
    ///
    /// # Errors
    /// Too little memory, or the GPU fails.
    pub fn fault_of(&self, gpu: &Gpu, plan: &ConvolutionPlan) -> Result<Option<String>, CudaError> {
        let PlanChoice { shape, form, .. } = plan.choice();
        let mut bench = Bench::new(shape, *form);
        let fault = bench.fault_of(gpu, plan);
        // Both errors are the GPU's; the first says more.
        let given_back = bench.give_back(gpu);
        let fault = fault?;
        given_back?;
        Ok(fault)
    }
}

/// Where a plan is tried.
struct Places {
    tensors: ConvolutionAddresses,
    workspace: u64,
    /// What cuDNN writes.
    output: Memory,
}

/// The tensors of a convolution, filled with random numbers: zeros would run faster.
struct Bench {
    shape: ConvolutionShape,
    form: Form,
    patterns: Patterns,
    memory: Vec<Memory>,
}

impl Bench {
    fn new(shape: &ConvolutionShape, form: Form) -> Bench {
        Bench { shape: *shape, form, patterns: Patterns::new(shape, form), memory: Vec::new() }
    }

    fn give_back(self, gpu: &Gpu) -> Result<(), CudaError> {
        self.memory.into_iter().try_for_each(|memory| gpu.free(memory))
    }

    fn allocate(&mut self, gpu: &Gpu, bytes: usize) -> Result<Memory, CudaError> {
        let memory = gpu.allocate(bytes)?;
        self.memory.push(memory);
        Ok(memory)
    }

    /// Tensors with their contents, and so many bytes of workspace.
    fn places(&mut self, gpu: &Gpu, workspace: usize) -> Result<Places, CudaError> {
        let part = self.form.part(&self.shape);
        let mut place = |tensor: Tensor, is_there: bool| -> Result<Memory, CudaError> {
            if !is_there {
                return Ok(Memory { address: 0, bytes: 0 });
            }
            let bytes = self.content(tensor);
            let memory = self.allocate(gpu, bytes.len())?;
            gpu.upload(memory, &bytes)?;
            Ok(memory)
        };
        let [x, weight, y] = [place(Tensor::X, true)?, place(Tensor::Weight, true)?, place(Tensor::Y, true)?];
        let [bias, residual] = [place(Tensor::Bias, part.has_bias)?, place(Tensor::Residual, part.has_residual)?];
        let workspace = self.allocate(gpu, workspace)?;
        let [x_at, weight_at, y_at, bias, residual] = [x, weight, y, bias, residual].map(|memory| memory.address);
        let tensors = ConvolutionAddresses { x: x_at, weight: weight_at, y: y_at, bias, residual };
        let output = match output_of(self.shape.pass) {
            _ if self.form.result_bytes(&self.shape) > 0 => workspace,
            Tensor::X => x,
            Tensor::Weight => weight,
            _ => y,
        };
        let tensor = output_of(self.shape.pass);
        let bytes = elements(&self.shape, tensor) * precision_of(&self.shape, self.form, tensor).bytes();
        Ok(Places { tensors, workspace: workspace.address, output: Memory { bytes, ..output } })
    }

    fn fastest(
        &mut self,
        gpu: &mut Gpu,
        plans: Vec<ConvolutionPlan>,
        refusals: &mut Vec<String>,
    ) -> Result<Option<ConvolutionPlan>, CudaError> {
        let largest = plans.iter().map(ConvolutionPlan::workspace).max().unwrap_or(0);
        let Places { tensors, workspace, output } = self.places(gpu, largest)?;
        let mut timed = Vec::new();
        for plan in plans {
            // SAFETY: the tensors are as large as the shape says and stay until all has ended; the workspace is as large as the largest
            // that a plan needs. Only this thread has the GPU.
            let prepared = unsafe { plan.prepare(&tensors, workspace) }?;
            match time(gpu, &prepared)? {
                Ok(time) => timed.push((time, plan, prepared)),
                Err(why) => refusals.push(self.refusal(&plan, &why)),
            }
        }
        timed.sort_by_key(|(time, ..)| *time);
        for (time, plan, prepared) in timed {
            match self.fault(gpu, &prepared, output)? {
                None => {
                    drop(prepared);
                    return Ok(Some(plan.timed(time)));
                }
                Some(why) => refusals.push(self.refusal(&plan, &why)),
            }
        }
        Ok(None)
    }

    fn fault_of(&mut self, gpu: &Gpu, plan: &ConvolutionPlan) -> Result<Option<String>, CudaError> {
        let Places { tensors, workspace, output } = self.places(gpu, plan.workspace())?;
        // SAFETY: as in `fastest`.
        let prepared = unsafe { plan.prepare(&tensors, workspace) }?;
        match self.result(gpu, &prepared, output) {
            Ok(result) => {
                let fault = fault(&self.shape, self.form, &self.patterns, &result, Scrutiny::Again);
                Ok(fault.map(|fault| format!("it computes something else: {fault}")))
            }
            Err(error @ CudaError::Library { .. }) => Ok(Some(error.to_string())),
            Err(error) => Err(error),
        }
    }

    fn refusal(&self, plan: &ConvolutionPlan, why: &str) -> String {
        format!("{}, engine {}: {why}", self.form, plan.choice().engine.engine)
    }

    /// What a tensor holds before a run; an output that is not added to holds what would spoil every sum.
    fn content(&self, tensor: Tensor) -> Vec<u8> {
        let (len, precision) = (elements(&self.shape, tensor), precision_of(&self.shape, self.form, tensor));
        if tensor == output_of(self.shape.pass) && !self.form.part(&self.shape).adds {
            return vec![0xFF; len * precision.bytes()];
        }
        self.patterns.of(tensor).bytes(len, precision)
    }

    /// What is wrong with what a plan gives.
    fn fault(&self, gpu: &Gpu, prepared: &PreparedConvolution, output: Memory) -> Result<Option<String>, CudaError> {
        let (first, second) = (self.result(gpu, prepared, output)?, self.result(gpu, prepared, output)?);
        if first != second {
            return Ok(Some("two runs give other bits".into()));
        }
        let fault = fault(&self.shape, self.form, &self.patterns, &first, Scrutiny::New);
        Ok(fault.map(|fault| format!("it computes something else: {fault}")))
    }

    /// What a plan gives.
    fn result(&self, gpu: &Gpu, prepared: &PreparedConvolution, output: Memory) -> Result<Vec<u8>, CudaError> {
        gpu.upload(output, &self.content(output_of(self.shape.pass)))?;
        prepared.run()?;
        gpu.download(output)
    }
}

/// How long a plan takes, or why it does not run.
fn time(gpu: &mut Gpu, prepared: &PreparedConvolution) -> Result<Result<Duration, String>, CudaError> {
    // The first run may load or compile.
    if let Err(error) = prepared.run() {
        return match error {
            CudaError::Library { .. } => Ok(Err(error.to_string())),
            other => Err(other),
        };
    }
    Ok(Ok(gpu.median_time(|| prepared.run())?))
}
