//! Programs as CUDA graphs: a GPU does the same, begun with one call.

use crate::build::Build;
use crate::conformance::{Answer, answer, compare};
use crate::machine::{Setting, WITH_KERNELS, not_tested, run, run_cases};
use crate::steps::{Run, config, gpu, images, pixels, train};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode as Mode};
use cudarc::driver::{CudaGraph, CudaStream};
use ddpm_dist::collective::Solo;
use ddpm_dist::device::cuda::{Cuda, Gpu, Image};
use ddpm_dist::device::{Device, Precision};
use ddpm_dist::diffusion::Schedule;
use ddpm_dist::train::{Config, Images, Shards, Share, Trainer};
use std::slice;
use std::sync::Arc;

/// Launches of graphs in this process, which only the machine made of software tells.
pub fn launches() -> Option<u64> {
    // SAFETY: the driver is there; the function is one of the machine's own, of that type.
    unsafe { sys::culib().get::<unsafe extern "C" fn() -> u64>(b"cuda_sim_graph_launches\0").ok().map(|count| count()) }
}

/// The flags with which the last graph was made, likewise.
fn flags() -> Option<u64> {
    // SAFETY: as above.
    unsafe { sys::culib().get::<unsafe extern "C" fn() -> u64>(b"cuda_sim_graph_flags\0").ok().map(|flags| flags()) }
}

/// Whether `count` is how many graphs were launched since there were `before`.
fn assert_launched(before: Option<u64>, count: u64) {
    let Some(before) = before else { return not_tested("how many graphs a real driver launches") };
    assert_eq!(launches().unwrap() - before, count);
}

/// A GPU that begins everything one by one.
fn without_graphs() -> Device {
    let mut device = gpu();
    let Device::Cuda(cuda) = &mut device else { unreachable!("it is a GPU") };
    cuda.give_up_graphs("the test wants none");
    assert!(device.take_notice().is_some_and(|said| said.contains("the test wants none")), "it says why");
    device
}

fn small(precision: Precision, shards: usize) -> Config {
    let mut config = config(&[8, 16], 3, 4);
    config.train.precision = precision;
    config.train.shards = Shards::Fixed(shards);
    config
}

/// Steps on `device`: of one shard, with one program, or of four, with three.
fn steps(device: &mut Device, precision: Precision, shards: usize, count: u64) -> Run {
    train(device, &small(precision, shards), SIZE, count)
}

const SIZE: [usize; 2] = [8, 8];

fn with_kernels(test: &str, cases: &[(&[Setting], &str)], body: impl Fn(&str)) {
    match Image::embedded() {
        Some(_) => run_cases(test, &WITH_KERNELS, cases, |said| body(said)),
        None => not_tested(&format!("{test}: built without nvcc")),
    }
}

#[test]
fn captured_steps_leave_the_bits_of_those_that_are_not() {
    with_kernels("graph::captured_steps_leave_the_bits_of_those_that_are_not", &[(&[], "")], |_| {
        for precision in [Precision::F32, Precision::Bf16] {
            // Each program is begun one by one the first time that it runs.
            for (shards, programs) in [(1, 1), (4, 3)] {
                let before = launches();
                let expected = steps(&mut without_graphs(), precision, shards, 4);
                assert_launched(before, 0);
                let mut device = gpu();
                let found = steps(&mut device, precision, shards, 4);
                assert_launched(before, 4 * shards as u64 - programs);
                assert!(found == expected, "{precision:?}, {shards} shards");
                assert_eq!(device.take_notice(), None);
            }
        }
    });
}

#[test]
fn timed_steps_are_not_captured() {
    with_kernels("graph::timed_steps_are_not_captured", &[(&[], "")], |_| {
        let (config, mut device) = (small(Precision::F32, 1), gpu());
        let (schedule, share) = (Schedule::new(&config.diffusion).unwrap(), Share::solo(&config.train).unwrap());
        let mut trainer = Trainer::new(&mut device, &config, &schedule, SIZE, share).unwrap();
        let (before, instructions) = (launches(), trainer.program().instructions.len());
        // Nor is one that has been captured before launched here.
        for (step, is_timed, launched) in
            [(0, true, 0), (1, true, 0), (2, false, 0), (3, false, 1), (4, true, 1), (5, false, 2)]
        {
            let pixels = pixels(&config, SIZE, step);
            match is_timed {
                true => {
                    let ticks =
                        trainer.begin_timed(&mut device, &mut Solo, &config, step, Images::Pixels(&pixels)).unwrap();
                    let done: usize = ticks.iter().map(|(_, ticks)| ticks.len() - 1).sum();
                    trainer.finish(&mut device, &mut Solo).unwrap();
                    assert_eq!(done, instructions, "step {step}");
                }
                false => drop(trainer.step(&mut device, &mut Solo, &config, step, Images::Pixels(&pixels)).unwrap()),
            }
            assert_launched(before, launched);
        }
    });
}

#[test]
fn captured_reverse_steps_leave_the_bits_of_those_that_are_not() {
    with_kernels("graph::captured_reverse_steps_leave_the_bits_of_those_that_are_not", &[(&[], "")], |_| {
        for precision in [Precision::F32, Precision::Bf16] {
            let before = launches();
            let expected = images(&mut without_graphs(), precision, 3);
            assert_launched(before, 0);
            // Six steps for the first two images, and six for the third.
            assert!(images(&mut gpu(), precision, 3) == expected, "{precision:?}");
            assert_launched(before, 11);
        }
    });
}

#[test]
fn a_capture_that_fails_is_told_once_and_the_steps_go_on() {
    let cases: [(&[Setting], &str); 5] = [
        (&[("CUDA_SIM_FAIL", "begin")], "capture a graph"),
        (&[("CUDA_SIM_FAIL", "capture")], "when stream is capturing"),
        (&[("CUDA_SIM_FAIL", "instantiate")], "make a graph"),
        (&[("CUDA_SIM_CUDNN_FAIL", "allocate")], "cuDNN 9.10.2 cannot run"),
        (&[("CUDA_SIM_CUBLASLT_FAIL", "allocate")], "cuBLASLt cannot multiply"),
    ];
    with_kernels("graph::a_capture_that_fails_is_told_once_and_the_steps_go_on", &cases, |said| {
        let before = launches();
        let (mut device, mut other) = (gpu(), without_graphs());
        assert!(images(&mut device, Precision::F32, 1) == images(&mut other, Precision::F32, 1));
        let notice = device.take_notice().unwrap();
        assert!(notice.contains(said) && notice.contains("DDPM_DIST_CUDA_GRAPH=off"), "{notice}");
        if said == "when stream is capturing" {
            let [found, expected] = [&mut device, &mut other].map(|device| steps(device, Precision::F32, 4, 2));
            assert!(found == expected);
            assert!(steps(&mut gpu(), Precision::F32, 4, 2) == expected, "the first that fails is a step of a shard");
        }
        images(&mut device, Precision::F32, 1);
        assert_eq!(device.take_notice(), None, "it is said once");
        assert_launched(before, 0);
    });
}

#[test]
fn the_environment_decides_whether_there_are_graphs() {
    let test = "graph::the_environment_decides_whether_there_are_graphs";
    let cases: [(&[Setting], &str); 3] = [
        (&[("DDPM_DIST_CUDA_GRAPH", "off")], "off"),
        (&[("DDPM_DIST_CUDA_GRAPH", "on")], "on"),
        (&[("DDPM_DIST_CUDA_GRAPH", "of")], "of"),
    ];
    with_kernels(test, &cases, |said| match (said, Cuda::open(0)) {
        ("of", Err(error)) => assert_eq!(
            error.to_string(),
            "DDPM_DIST_CUDA_GRAPH=of is unknown: it is on or off; unset it to have steps captured as CUDA graphs"
        ),
        ("on", Ok(cuda)) => assert!(cuda.makes_graphs()),
        ("off", Ok(cuda)) => {
            assert!(!cuda.makes_graphs());
            let (before, mut device) = (launches(), Device::Cuda(Box::new(cuda)));
            steps(&mut device, Precision::F32, 1, 2);
            assert_launched(before, 0);
            assert_eq!(device.take_notice(), None, "it was asked for");
        }
        (_, opened) => panic!("{said}: {:?}", opened.err()),
    });
}

/// What the driver itself does.
struct Driver {
    stream: Arc<CudaStream>,
    address: u64,
    gpu: Gpu,
}

const BYTES: usize = 64;
const NO_FLAGS: CUgraphInstantiate_flags = CUgraphInstantiate_flags(0);

impl Driver {
    fn open() -> Driver {
        let gpu = Gpu::without_kernels(0).unwrap();
        let memory = gpu.allocate(BYTES).unwrap();
        Driver { stream: gpu.stream().clone(), address: memory.address, gpu }
    }

    /// Begins to set all of the memory.
    fn set(&self, stream: &CudaStream, value: u8) -> Result<(), DriverError> {
        // SAFETY: the memory is that long.
        unsafe { result::memset_d8_async(self.address, value, BYTES, stream.cu_stream()) }
    }

    fn read(&self) -> Result<Vec<u8>, DriverError> {
        let mut bytes = vec![0; BYTES];
        // SAFETY: both sides are that long.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, self.address) }.map(|()| bytes)
    }

    /// What a call in a capture is answered, then something that is captured after it, and the end; and whether the stream goes on after that
    /// as if nothing had been captured.
    fn during_a_capture(&self, call: &dyn Fn() -> Result<(), DriverError>) -> [Answer; 4] {
        let stream = &self.stream;
        self.set(stream, 1).unwrap();
        stream.begin_capture(THREAD).unwrap();
        self.set(stream, 2).unwrap();
        let said = answer(call());
        let after = answer(self.set(stream, 3));
        let end = self.end().map(drop);
        let left = stream.synchronize().and_then(|()| self.read()).map_err(|error| error.0);
        let is_as_before =
            |bytes: Vec<u8>| if bytes == [1; BYTES] { Ok(()) } else { Err(CUresult::CUDA_ERROR_UNKNOWN) };
        [said, after, end, left.and_then(is_as_before)]
    }

    fn end(&self) -> Result<CudaGraph, CUresult> {
        let graph = self.stream.end_capture(NO_FLAGS).map_err(|error| error.0)?;
        graph.ok_or(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
    }
}

const THREAD: Mode = Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;

#[test]
fn a_graph_does_what_was_begun_whenever_it_is_launched() {
    run("graph::a_graph_does_what_was_begun_whenever_it_is_launched", || {
        let driver = Driver::open();
        let Driver { stream, .. } = &driver;
        let holds = |value: u8| {
            stream.synchronize().unwrap();
            assert_eq!(driver.read().unwrap(), vec![value; BYTES]);
        };
        driver.set(stream, 1).unwrap();
        stream.begin_capture(THREAD).unwrap();
        driver.set(stream, 2).unwrap();
        driver.set(stream, 3).unwrap();
        let graph = driver.end().unwrap();
        holds(1);
        for _ in 0..2 {
            graph.launch().unwrap();
            holds(3);
            driver.set(stream, 4).unwrap();
            holds(4);
        }
    });
}

const UNSUPPORTED: Answer = Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
const INVALIDATED: Answer = Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);

/// A call, what it is, and the answer that it gets.
type Call<'a> = (&'a str, Answer, Box<dyn Fn() -> Result<(), DriverError> + 'a>);

#[test]
fn what_no_graph_can_hold_is_refused_and_spoils_the_capture() {
    run("graph::what_no_graph_can_hold_is_refused_and_spoils_the_capture", || {
        let driver = Driver::open();
        let Driver { stream, gpu, .. } = &driver;
        let other = gpu.allocate(BYTES).unwrap();
        let elsewhere = stream.context().new_stream().unwrap();
        let outside = elsewhere.record_event(None).unwrap();
        let calls: [Call<'_>; 6] = [
            ("waits for the stream", UNSUPPORTED, Box::new(|| stream.synchronize())),
            ("waits for the context", UNSUPPORTED, Box::new(|| stream.context().synchronize())),
            // SAFETY: the size is not zero.
            ("allocates", UNSUPPORTED, Box::new(|| unsafe { result::malloc_sync(BYTES) }.map(drop))),
            // SAFETY: it is memory of this GPU, which nothing uses.
            ("frees", UNSUPPORTED, Box::new(|| unsafe { result::free_sync(other.address) })),
            (
                "waits for an event of the capture",
                Err(CUresult::CUDA_ERROR_CAPTURED_EVENT),
                Box::new(|| stream.record_event(None)?.synchronize()),
            ),
            (
                "lets the capture wait for what is outside",
                Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION),
                Box::new(|| stream.wait(&outside)),
            ),
        ];
        let mut answers = Vec::new();
        for (what, expected, call) in &calls {
            let [said, after, end, left] = driver.during_a_capture(call);
            answers.push((format!("in a capture, {what}"), said, slice::from_ref(expected)));
            answers.push((format!("the capture goes on after it {what}"), after, &[INVALIDATED]));
            answers.push((format!("the capture ends after it {what}"), end, &[INVALIDATED]));
            answers.push((format!("the stream is as good as before after it {what}"), left, &[Ok(())]));
        }
        compare(answers);
    });
}

/// All streams here are non-blocking: what goes the legacy stream's way has to do with none of them.
#[test]
fn a_copy_that_waits_is_no_business_of_a_capture() {
    run("graph::a_copy_that_waits_is_no_business_of_a_capture", || {
        let driver = Driver::open();
        let [said, after, end, left] = driver.during_a_capture(&|| driver.read().map(drop));
        compare(vec![
            ("in a capture, copies and waits", said, &[Ok(())]),
            ("the capture goes on after it", after, &[Ok(())]),
            ("the capture ends after it", end, &[Ok(())]),
            ("nothing of the capture has run", left, &[Ok(())]),
        ]);
    });
}

#[test]
fn a_relaxed_capture_allows_what_happens_at_once() {
    run("graph::a_relaxed_capture_allows_what_happens_at_once", || {
        let driver = Driver::open();
        driver.stream.begin_capture(Mode::CU_STREAM_CAPTURE_MODE_RELAXED).unwrap();
        driver.set(&driver.stream, 2).unwrap();
        // SAFETY: the size is not zero.
        let memory = unsafe { result::malloc_sync(BYTES) }.unwrap();
        let graph = driver.end().unwrap();
        // SAFETY: it has just been allocated, and nothing uses it.
        unsafe { result::free_sync(memory) }.unwrap();
        graph.launch().unwrap();
        driver.stream.synchronize().unwrap();
        assert_eq!(driver.read().unwrap(), [2; BYTES]);
    });
}

#[test]
fn a_stream_that_joins_a_capture_must_be_waited_for() {
    run("graph::a_stream_that_joins_a_capture_must_be_waited_for", || {
        let driver = Driver::open();
        let Driver { stream, .. } = &driver;
        let side = stream.context().new_stream().unwrap();
        for is_joined in [true, false] {
            driver.set(stream, 1).unwrap();
            stream.begin_capture(THREAD).unwrap();
            side.wait(&stream.record_event(None).unwrap()).unwrap();
            driver.set(&side, 2).unwrap();
            if is_joined {
                stream.wait(&side.record_event(None).unwrap()).unwrap();
                let graph = driver.end().unwrap();
                graph.launch().unwrap();
                stream.synchronize().unwrap();
                assert_eq!(driver.read().unwrap(), [2; BYTES]);
            } else {
                assert_eq!(driver.end().err(), Some(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNJOINED));
            }
            side.synchronize().unwrap();
        }
    });
}

#[test]
fn a_capture_is_ended_where_it_began() {
    run("graph::a_capture_is_ended_where_it_began", || {
        let driver = Driver::open();
        let stream = &driver.stream;
        let other = stream.context().new_stream().unwrap();
        let in_a_capture = |call: &dyn Fn() -> Answer| {
            stream.begin_capture(THREAD).unwrap();
            let said = call();
            // Whether such a call spoils the capture is written nowhere.
            let _ = driver.end();
            said
        };
        let again = in_a_capture(&|| answer(stream.begin_capture(THREAD)));
        let elsewhere = in_a_capture(&|| {
            std::thread::scope(|scope| {
                scope.spawn(|| stream.end_capture(NO_FLAGS).map(drop).map_err(|error| error.0)).join().unwrap()
            })
        });
        let fine = in_a_capture(&|| answer(driver.set(stream, 2)));
        compare(vec![
            ("ends a capture that was not begun", answer(other.end_capture(NO_FLAGS)), NOT_SO),
            ("begins a capture twice", again, NOT_SO),
            ("ends it on another thread", elsewhere, &[Err(CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD)]),
            ("captures after that", fine, &[Ok(())]),
        ]);
    });
}

/// The pages say that it is invalid, and not with which of these.
const NOT_SO: &[Answer] = &[Err(CUresult::CUDA_ERROR_INVALID_VALUE), Err(CUresult::CUDA_ERROR_ILLEGAL_STATE)];

#[test]
fn graphs_are_made_as_they_are_wanted() {
    run("graph::graphs_are_made_as_they_are_wanted", || {
        let driver = Driver::open();
        let made = |flags: u32| {
            driver.stream.begin_capture(THREAD).unwrap();
            driver.set(&driver.stream, 2).unwrap();
            answer(driver.stream.end_capture(CUgraphInstantiate_flags(flags)))
        };
        let [invalid, fine]: [&[Answer]; 2] = [&[Err(CUresult::CUDA_ERROR_INVALID_VALUE)], &[Ok(())]];
        // CUDA_GRAPH_INSTANTIATE_FLAG_: 1 AUTO_FREE_ON_LAUNCH, 4 DEVICE_LAUNCH, 8 USE_NODE_PRIORITY.
        compare(vec![
            ("makes a graph", made(0), fine),
            ("makes one whose kernels keep their priorities", made(8), fine),
            ("makes one to be launched from everywhere that frees its memory", made(1 | 4), invalid),
        ]);
    });
}

/// Sums between GPUs go first in a graph too.
#[test]
fn kernels_of_a_program_keep_their_priorities() {
    const LIBRARIES: [Build; 3] = [Build::BareDriver, Build::Cudnn, Build::CublasLt];
    run_cases("graph::kernels_of_a_program_keep_their_priorities", &LIBRARIES, &[(&[], ())], |()| {
        let cuda = Cuda::without_kernels(0).unwrap();
        drop(cuda.capture().unwrap().end().unwrap());
        match flags() {
            Some(flags) => assert_eq!(flags, 8),
            None => not_tested("how a real driver has made a graph"),
        }
    });
}
