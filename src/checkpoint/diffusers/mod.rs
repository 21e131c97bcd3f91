//! Directories of the Python library diffusers: what is trained here loads there, and the reverse.
//!
//! ```text
//! model_index.json                               DDPMPipeline = unet + scheduler
//! unet/config.json                               UNet2DModel's arguments          ↔ UnetConfig
//! unet/diffusion_pytorch_model.safetensors       its weights, convolutions OIHW   ↔ ours, OHWI
//! scheduler/scheduler_config.json                DDPMScheduler or DDIMScheduler   ↔ DiffusionConfig, SamplerConfig
//! ```
//!
//! Parameter names are the same on both sides. A key that is absent has diffusers' default, which for this model is often the
//! wrong value; so everything is written out, and what cannot be expressed here is refused by its key.

mod error;
mod export;
mod half;
mod import;
mod json;
mod names;
mod scheduler;
mod unet;

#[cfg(test)]
mod tests;

pub use error::{DiffusersError, TensorProblem};
pub use export::export;
pub use import::{Imported, Tensor, import, is_diffusers_dir};
pub use names::{expected_tensors, our_shape};

/// The diffusers release whose behaviour this follows.
const DIFFUSERS_VERSION: &str = "0.42.1";

const MODEL_INDEX: &str = "model_index.json";
const UNET: &str = "unet";
const UNET_CONFIG: &str = "config.json";
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";
const SCHEDULER: &str = "scheduler";
const SCHEDULER_CONFIG: &str = "scheduler_config.json";
