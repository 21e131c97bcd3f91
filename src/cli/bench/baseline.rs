//! What was measured before, to compare with.

use super::Report;
use crate::cli::exit::{Code, Failure};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};

/// What steps are measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum What {
    /// All of training but fetching images.
    #[default]
    Training,
    /// The network and one step of the reverse process.
    Sampling,
}

impl What {
    pub fn name(self) -> &'static str {
        match self {
            What::Training => "training",
            What::Sampling => "sampling",
        }
    }
}

/// What must be alike for a comparison to say something.
#[derive(Clone, Debug)]
pub(super) struct Subject {
    pub what: What,
    pub batch: usize,
    pub device: &'static str,
    pub dtype: String,
}

/// A file that was written by `bench --json`, or by its peer.
#[derive(Debug)]
pub(super) struct Baseline {
    path: PathBuf,
    measured: Measured,
}

#[derive(Debug, Deserialize)]
struct Measured {
    tool: String,
    version: String,
    #[serde(default)]
    what: What,
    batch: usize,
    device: String,
    gpu: Option<String>,
    dtype: String,
    images_per_second: f64,
    gflops: f64,
}

/// By how much this is faster.
#[derive(Debug, Serialize)]
pub(super) struct Comparison {
    tool: String,
    version: String,
    images_per_second: f64,
    /// Ours, in theirs.
    ratio: f64,
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Comparison { tool, version, images_per_second, ratio } = self;
        write!(f, "{ratio:.2} times the {images_per_second:.2} images per second of {tool} {version}")
    }
}

impl Baseline {
    /// # Errors
    /// A file that cannot be read, or is no such one.
    pub fn read(path: &Path) -> Result<Baseline, Failure> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::new(Code::Usage, format!("cannot read --compare {}: {error}", path.display())))?;
        let measured = serde_json::from_str(&text).map_err(|error| {
            let what = "expected what `ddpm-dist bench --json` or benches/pytorch/train_step.py --json writes";
            Failure::new(Code::Usage, format!("--compare {}: {error}; {what}", path.display()))
        })?;
        Ok(Baseline { path: path.to_path_buf(), measured })
    }

    fn differs(&self, in_what: &str, there: impl fmt::Display, here: impl fmt::Display) -> Failure {
        let path = self.path.display();
        let message =
            format!("--compare {path} is of another {in_what}: {there} there, {here} here; measure both alike");
        Failure::new(Code::Usage, message)
    }

    /// Refuses what was measured on something else.
    ///
    /// # Errors
    /// What differs.
    pub fn must_be_of(&self, subject: &Subject) -> Result<(), Failure> {
        let Measured { what, batch, device, dtype, .. } = &self.measured;
        if *what != subject.what {
            return Err(self.differs("kind of step", what.name(), subject.what.name()));
        }
        if *batch != subject.batch {
            return Err(self.differs("batch", batch, subject.batch));
        }
        if device != subject.device {
            return Err(self.differs("device", device, subject.device));
        }
        if *dtype != subject.dtype {
            return Err(self.differs("precision", dtype, &subject.dtype));
        }
        Ok(())
    }

    /// # Errors
    /// A network with other FLOPs, or another GPU.
    pub fn compared(&self, report: &Report) -> Result<Comparison, Failure> {
        let Measured { tool, version, gpu, images_per_second, gflops, .. } = &self.measured;
        if *gpu != report.gpu {
            let name = |gpu: &Option<String>| gpu.clone().unwrap_or_else(|| "none".into());
            return Err(self.differs("GPU", name(gpu), name(&report.gpu)));
        }
        let per_image = |gflops: f64, images: f64| gflops / images;
        let [there, here] =
            [per_image(*gflops, *images_per_second), per_image(report.gflops, report.images_per_second)];
        // Which products are counted differs a little between tools: small ones of the timestep.
        if (there / here - 1.0).abs() > 0.02 {
            let show = |gflop: f64| format!("{gflop:.3} GFLOP an image");
            return Err(self.differs("network", show(there), show(here)));
        }
        let ratio = report.images_per_second / images_per_second;
        Ok(Comparison { tool: tool.clone(), version: version.clone(), images_per_second: *images_per_second, ratio })
    }
}
