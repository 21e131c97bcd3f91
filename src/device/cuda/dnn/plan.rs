//! How a convolution is computed: a plan, the choice that it comes from, and its execution on addresses.

use super::descriptor::{Address, Descriptor};
use super::engine::{EngineChoice, EnginePlan};
use super::form::{Form, Rest, Tensor, output_of};
use super::graph::{ALIGNMENT, Graph, id_of};
use super::{Dnn, Handle};
use crate::device::cuda::{ConvolutionShape, CudaError};
use cudarc::cudnn::sys::cudnnBackendAttributeName_t as Name;
use cudarc::cudnn::sys::cudnnBackendDescriptorType_t as Kind;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// What was chosen for a convolution, by one cuDNN on one GPU: a [`PlanTable`](crate::device::cuda::PlanTable) says which.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlanChoice {
    /// What is computed.
    pub shape: ConvolutionShape,
    /// How much of it cuDNN computes.
    pub form: Form,
    /// By which engine.
    pub engine: EngineChoice,
}

/// How a convolution is computed. Copies share it.
#[derive(Clone, Debug)]
pub struct ConvolutionPlan {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Each of these goes before what it is made of.
    plan: EnginePlan,
    graph: Arc<Graph>,
    handle: Arc<Handle>,
    choice: PlanChoice,
    time: Option<Duration>,
}

/// Where a convolution's tensors are; 16 divides each address. Those that its shape has not are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConvolutionAddresses {
    /// x or its gradient.
    pub x: u64,
    /// The weights or their gradient.
    pub weight: u64,
    /// y or its gradient.
    pub y: u64,
    /// The bias.
    pub bias: u64,
    /// The residual.
    pub residual: u64,
}

impl ConvolutionAddresses {
    fn of(&self, tensor: Tensor) -> u64 {
        match tensor {
            Tensor::X => self.x,
            Tensor::Weight => self.weight,
            Tensor::Y => self.y,
            Tensor::Bias => self.bias,
            Tensor::Residual => self.residual,
        }
    }
}

impl ConvolutionPlan {
    pub(super) fn new(dnn: &Dnn, shape: &ConvolutionShape, form: Form, graph: Arc<Graph>, plan: EnginePlan) -> Self {
        let choice = PlanChoice { shape: *shape, form, engine: plan.config.choice.clone() };
        ConvolutionPlan { shared: Arc::new(Shared { plan, graph, handle: dnn.handle.clone(), choice, time: None }) }
    }

    /// With the time that it has been found to take. The plan has no copies yet.
    pub(in crate::device::cuda) fn timed(mut self, time: Duration) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.time = Some(time);
        }
        self
    }

    /// To have the same plan again.
    pub fn choice(&self) -> &PlanChoice {
        &self.shared.choice
    }

    /// What is left to do for kernels of this program.
    pub fn rest(&self) -> Rest {
        self.choice().form.rest(&self.choice().shape)
    }

    /// Bytes that it needs while it runs, and until the [rest](ConvolutionPlan::rest) is done.
    pub fn workspace(&self) -> usize {
        self.result_bytes() + self.shared.plan.workspace
    }

    fn result_bytes(&self) -> usize {
        self.choice().form.result_bytes(&self.choice().shape)
    }

    /// How long it took when plans were compared; none if they were not.
    pub fn time(&self) -> Option<Duration> {
        self.shared.time
    }

    /// Binds it to addresses, once for all its runs: a run then allocates nothing. `workspace` has
    /// [so many bytes](ConvolutionPlan::workspace), and 256 divides its address.
    ///
    /// # Errors
    /// cuDNN's.
    ///
    /// # Panics
    /// If an address is not a multiple of what it must be, or a tensor has none.
    ///
    /// # Safety
    /// Whenever it runs, the addresses are those of memory of this GPU, as long as the shape and the workspace make of it, and no other
    /// thread uses the same [`Dnn`].
    pub unsafe fn prepare(
        &self,
        addresses: &ConvolutionAddresses,
        workspace: u64,
    ) -> Result<PreparedConvolution, CudaError> {
        let shape = &self.choice().shape;
        let is_apart = matches!(self.rest(), Rest::Gradient(_));
        let address = |tensor: &Tensor| match is_apart && *tensor == output_of(shape.pass) {
            true => workspace,
            false => addresses.of(*tensor),
        };
        let tensors = &self.shared.graph.tensors;
        let places: Vec<Address> = tensors.iter().map(|tensor| Address(address(tensor))).collect();
        for (tensor, Address(place)) in tensors.iter().zip(&places) {
            assert!(*place != 0 && place.is_multiple_of(ALIGNMENT), "{shape}: {tensor:?} at {place:#x}");
        }
        let needs_workspace = self.workspace() > 0;
        assert!(
            !needs_workspace || workspace != 0 && workspace.is_multiple_of(256),
            "{shape}: workspace {workspace:#x}"
        );
        let rest = if self.shared.plan.workspace > 0 { workspace + self.result_bytes() as u64 } else { 0 };
        let ids: Vec<i64> = tensors.iter().map(|tensor| id_of(*tensor)).collect();
        let library = self.shared.handle.library;
        let pack = Descriptor::new(library, Kind::CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, &ids)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, &places)?
            .with(Name::CUDNN_ATTR_VARIANT_PACK_WORKSPACE, &[Address(rest)])?
            .finalized()?;
        Ok(PreparedConvolution { pack, plan: self.clone() })
    }
}

/// A plan bound to addresses.
#[derive(Debug)]
pub struct PreparedConvolution {
    pack: Descriptor,
    plan: ConvolutionPlan,
}

impl PreparedConvolution {
    /// The plan.
    pub fn plan(&self) -> &ConvolutionPlan {
        &self.plan
    }

    /// Begins cuDNN's part on the GPU's stream.
    ///
    /// # Errors
    /// cuDNN's. What goes wrong on the GPU comes with a later call.
    pub fn run(&self) -> Result<(), CudaError> {
        let shared = &self.plan.shared;
        let handle = &shared.handle;
        handle.bind()?;
        // SAFETY: all three live, and are finalized; the addresses hold, as whoever made this has said.
        let status = unsafe { (handle.library.execute)(handle.raw, shared.plan.plan.raw(), self.pack.raw()) };
        let what = || format!("run the {} by engine {}", shared.choice.shape, shared.choice.engine.engine);
        Ok(handle.library.check(status, what)?)
    }
}
