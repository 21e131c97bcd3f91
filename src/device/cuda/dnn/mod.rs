//! Convolutions of cuDNN 9, through its backend (graph) interface.
//!
//! cuDNN has many engines for a convolution. Those that give other bits each time, that round f32, or that sum in less than f32 are refused
//! by what they say of themselves; [`Dnn::search`] times the others, and refuses those that compute something else.

mod descriptor;
mod engine;
mod form;
mod graph;
mod library;
mod plan;
mod sample;
mod search;

pub use engine::{EngineChoice, EngineNotes, Knob};
pub use form::{Form, Rest};
pub use plan::{ConvolutionAddresses, ConvolutionPlan, PlanChoice, PreparedConvolution};

use super::{ConvolutionShape, CudaError, Gpu};
use cudarc::cudnn::sys;
use cudarc::driver::CudaStream;
use engine::{Config, MODES, proposed};
use graph::Graph;
use library::{Library, Refusal, is_unsupported};
use std::cell::Cell;
use std::collections::HashSet;
use std::marker::PhantomData;
use std::sync::Arc;

/// cuDNN on one GPU, whose stream it uses.
pub struct Dnn {
    handle: Arc<Handle>,
    /// Two threads must not use a handle at a time.
    _is_not_sync: PhantomData<Cell<()>>,
}

/// cuDNN's handle; plans need it as long as they live.
#[derive(Debug)]
struct Handle {
    raw: sys::cudnnHandle_t,
    library: &'static Library,
    stream: Arc<CudaStream>,
}

// SAFETY: a handle belongs to no thread; what takes it binds the context to its thread first.
unsafe impl Send for Handle {}
// SAFETY: two threads must not use it at a time. `Dnn` is not `Sync`, and who prepares a plan answers for its runs.
unsafe impl Sync for Handle {}

impl Handle {
    fn bind(&self) -> Result<(), CudaError> {
        let cannot = |source| CudaError::Driver { action: "use the GPU on this thread".into(), source };
        self.stream.context().bind_to_thread().map_err(cannot)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it was made by the library, and nothing has it after this. A failure leaves nothing to be done.
        unsafe { (self.library.destroy)(self.raw) };
    }
}

impl Dnn {
    /// cuDNN for a GPU.
    ///
    /// # Errors
    /// No cuDNN, one of another version, or one that cannot use this GPU.
    pub fn open(gpu: &Gpu) -> Result<Dnn, CudaError> {
        let library = Library::get()?;
        let stream = gpu.stream().clone();
        let bound = stream.context().bind_to_thread();
        bound.map_err(|source| CudaError::Driver { action: "use the GPU on this thread".into(), source })?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the library writes to a pointer that lives.
        let status = unsafe { (library.create)(&mut raw) };
        library.check(status, || "begin".into())?;
        let handle = Arc::new(Handle { raw, library, stream });
        // SAFETY: the handle and the stream live, and the handle keeps the stream.
        let status = unsafe { (library.set_stream)(raw, handle.stream.cu_stream().cast()) };
        library.check(status, || "use the GPU's stream".into())?;
        Ok(Dnn { handle, _is_not_sync: PhantomData })
    }

    /// `9.10.2`
    pub fn version(&self) -> String {
        self.handle.library.version_name()
    }

    /// The first plan that may be used and needs at most `limit` bytes of workspace: cuDNN's guess.
    ///
    /// # Errors
    /// There is none, or cuDNN fails.
    pub fn plan(&self, shape: &ConvolutionShape, limit: usize) -> Result<ConvolutionPlan, CudaError> {
        let mut refusals = Vec::new();
        for form in Form::all(shape).concat() {
            if let Some(plan) = self.plans(shape, form, limit, 1, &mut refusals)?.pop() {
                return Ok(plan);
            }
        }
        Err(self.no_plan(shape, refusals))
    }

    /// What each engine says of itself that cuDNN proposes for a convolution as a whole, in the order in which it does.
    ///
    /// # Errors
    /// cuDNN's.
    pub fn engine_notes(&self, shape: &ConvolutionShape) -> Result<Vec<EngineNotes>, CudaError> {
        self.handle.bind()?;
        let library = self.handle.library;
        let graph = Graph::new(library, self.handle.raw, shape, Form::Whole)?;
        let mut notes: Vec<EngineNotes> = Vec::new();
        for mode in MODES {
            let configs = match proposed(library, &graph, mode) {
                Err(refusal) if is_unsupported(refusal.status) => continue,
                other => other?,
            };
            for config in configs {
                if notes.iter().all(|known| known.engine != config.choice.engine) {
                    notes.push(config.engine_notes(shape.precision)?);
                }
            }
        }
        Ok(notes)
    }

    /// The plan that was chosen before, by the same cuDNN on such a GPU.
    ///
    /// # Errors
    /// It does not exist here, or may not be used.
    pub fn plan_from_choice(&self, choice: &PlanChoice) -> Result<ConvolutionPlan, CudaError> {
        let shape = &choice.shape;
        self.handle.bind()?;
        let refused = |why: String| self.no_plan(shape, vec![format!("engine {}: {why}", choice.engine.engine)]);
        let said = |refusal: Refusal| match is_unsupported(refusal.status) {
            true => refused(refusal.error.to_string()),
            false => refusal.error,
        };
        if !Form::all(shape).concat().contains(&choice.form) {
            return Err(refused(format!("it cannot be computed {}", choice.form)));
        }
        let graph = Graph::new(self.handle.library, self.handle.raw, shape, choice.form).map_err(said)?;
        let config = Config::chosen(self.handle.library, &graph, &choice.engine).map_err(said)?;
        if let Some(fault) = config.fault(shape.precision) {
            return Err(refused(fault.into()));
        }
        let plan = config.plan(&self.handle).map_err(said)?;
        Ok(ConvolutionPlan::new(self, shape, choice.form, Arc::new(graph), plan))
    }

    /// At most `most` plans for what `form` makes of a convolution, best first by cuDNN's guess. Says why others are not among them.
    fn plans(
        &self,
        shape: &ConvolutionShape,
        form: Form,
        limit: usize,
        most: usize,
        refusals: &mut Vec<String>,
    ) -> Result<Vec<ConvolutionPlan>, CudaError> {
        self.handle.bind()?;
        let graph = match Graph::new(self.handle.library, self.handle.raw, shape, form) {
            Ok(graph) => Arc::new(graph),
            Err(refusal) if is_unsupported(refusal.status) => {
                refusals.push(format!("{form}: {}", refusal.error));
                return Ok(Vec::new());
            }
            Err(refusal) => return Err(refusal.error),
        };
        let (mut plans, mut seen) = (Vec::new(), HashSet::new());
        for mode in MODES {
            let configs = match proposed(self.handle.library, &graph, mode) {
                Err(refusal) if is_unsupported(refusal.status) => {
                    refusals.push(format!("{form}: {}", refusal.error));
                    continue;
                }
                other => other?,
            };
            for config in configs {
                if !seen.insert(config.choice.clone()) {
                    continue;
                }
                let engine = config.choice.engine;
                match self.accepted(shape, form, limit, &graph, config) {
                    Ok(plan) => plans.push(plan),
                    Err(why) => refusals.push(format!("{form}, engine {engine}: {why}")),
                }
                if plans.len() == most {
                    return Ok(plans);
                }
            }
        }
        Ok(plans)
    }

    /// The plan of a configuration, or why there is none that may be used.
    fn accepted(
        &self,
        shape: &ConvolutionShape,
        form: Form,
        limit: usize,
        graph: &Arc<Graph>,
        config: Config,
    ) -> Result<ConvolutionPlan, String> {
        if let Some(fault) = config.fault(shape.precision) {
            return Err(fault.into());
        }
        let plan = config.plan(&self.handle).map_err(|refusal| refusal.error.to_string())?;
        let plan = ConvolutionPlan::new(self, shape, form, graph.clone(), plan);
        if plan.workspace() > limit {
            return Err(format!("it needs {} bytes of workspace, and may have {limit}", plan.workspace()));
        }
        Ok(plan)
    }

    fn no_plan(&self, shape: &ConvolutionShape, refusals: Vec<String>) -> CudaError {
        CudaError::NoPlan { library: format!("cuDNN {}", self.version()), what: shape.to_string(), refusals }
    }
}
