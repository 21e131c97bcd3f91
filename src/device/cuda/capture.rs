//! Capture: what is begun on a GPU's stream becomes a CUDA graph, which is then begun as a whole, with one call of the driver.
//!
//! While its stream captures, a thread must begin nothing elsewhere, wait for nothing and allocate nothing: the driver refuses it, and the
//! capture has failed. Nothing that is captured runs before the graph does.

use super::CudaError;
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream};
use std::fmt;
use std::sync::Arc;

/// Kernels keep the priority of the stream that they were captured on, so that sums between GPUs still go first (`Lane::beside`); without it
/// all have that of the stream on which the graph is launched.
const FLAGS: CUgraphInstantiate_flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY;

/// The environment variable that decides whether programs become graphs.
const VARIABLE: &str = "DDPM_DIST_CUDA_GRAPH";

/// Whether programs become graphs: they do, unless `DDPM_DIST_CUDA_GRAPH=off`.
///
/// # Errors
/// It is neither `on` nor `off`.
pub(super) fn are_wanted() -> Result<bool, CudaError> {
    match std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        None => Ok(true),
        Some(value) if value == "on" => Ok(true),
        Some(value) if value == "off" => Ok(false),
        Some(value) => Err(CudaError::UnknownGraphSetting(value.to_string_lossy().into_owned())),
    }
}

fn cannot(action: &str) -> impl Fn(DriverError) -> CudaError {
    move |source| CudaError::Driver { action: action.into(), source }
}

/// A stream that captures, until this is dropped.
#[must_use = "the stream captures only as long as this is there"]
pub struct Capture {
    stream: Arc<CudaStream>,
    is_open: bool,
}

impl Capture {
    /// Lets a stream capture. cudarc must not track buffers by events, which are none of the capture's: it does so for its own `CudaSlice`,
    /// and there is none here.
    pub(super) fn begin(stream: &Arc<CudaStream>) -> Result<Capture, CudaError> {
        // What this thread does that a graph cannot hold is refused rather than done once and forgotten; what other threads do (they load
        // images, write checkpoints, watch) is no business of the capture.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        stream.begin_capture(mode).map_err(cannot("capture a graph"))?;
        Ok(Capture { stream: stream.clone(), is_open: true })
    }

    /// The graph of what has been begun.
    ///
    /// # Errors
    /// Something was begun that a graph cannot hold, or the driver cannot make one.
    pub fn end(mut self) -> Result<Graph, CudaError> {
        self.is_open = false;
        let nothing = || CudaError::Driver {
            action: "capture a graph".into(),
            source: DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED),
        };
        let graph = self.stream.end_capture(FLAGS).map_err(cannot("make a graph"))?;
        Ok(Graph(graph.ok_or_else(nothing)?))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if self.is_open {
            // It takes the stream out of the capture, whose graph, if there is one, nobody wants; what failed has been told.
            let _ = self.stream.end_capture(FLAGS);
        }
    }
}

/// What was captured, ready to be begun as often as it is wanted. It has the addresses of buffers and keeps none of them: they are the
/// device's, which keeps them as long as it lives.
pub struct Graph(CudaGraph);

impl Graph {
    /// Begins it on the stream that captured it.
    ///
    /// # Safety
    /// The device that it was captured on is still there.
    pub(super) unsafe fn launch(&self) -> Result<(), CudaError> {
        self.0.launch().map_err(cannot("launch a graph"))
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

/// Whether a device makes graphs, and what there is to say about it.
#[derive(Debug)]
pub(super) struct Graphs {
    are_on: bool,
    notice: Option<String>,
}

impl Graphs {
    /// As the environment says.
    ///
    /// # Errors
    /// It says something else than `on` and `off`.
    pub fn new() -> Result<Graphs, CudaError> {
        Ok(Graphs { are_on: are_wanted()?, notice: None })
    }

    pub fn are_on(&self) -> bool {
        self.are_on
    }

    /// There are none from now on, which is said once.
    pub fn give_up(&mut self, why: &str) {
        if std::mem::take(&mut self.are_on) {
            self.notice = Some(format!(
                "each step begins its kernels one by one, which is slower, as they could not be made one CUDA graph: {why} \
                 ({VARIABLE}=off does not try)"
            ));
        }
    }

    pub fn take_notice(&mut self) -> Option<String> {
        self.notice.take()
    }
}
