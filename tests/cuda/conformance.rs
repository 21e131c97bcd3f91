//! What a driver promises and refuses, one call after another: on the machine made of software and, from the same lines, on a real card
//! (`DDPM_DIST_KERNELS=gpu`). Each answer is printed; a card that answers otherwise belongs into docs/kernels.md, and the machine after it.

use crate::convolution::{PASSES, shape};
use crate::cudnn::{BOTH, open};
use crate::machine::{run, say};
use crate::steps::with_kernels;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{CUevent_flags, CUresult};
use cudarc::driver::{CudaContext, CudaStream};
use ddpm_dist::device::cuda::dnn::EngineNotes;
use ddpm_dist::device::cuda::{CudaError, Gpu, Launch, Memory, Precision};
use ddpm_dist::ops::copy::{Copy, cuda};
use std::fmt::Display;
use std::process::Command;
use std::sync::Arc;

/// Success, or what the driver says.
pub type Answer = Result<(), CUresult>;

/// A card with some memory.
struct Card {
    gpu: Gpu,
    stream: Arc<CudaStream>,
    memory: Memory,
}

const ELEMENTS: usize = 1000;

impl Card {
    fn open() -> Card {
        let gpu = Gpu::open(0).unwrap_or_else(|error| panic!("{error}"));
        let memory = gpu.allocate(4 * ELEMENTS).unwrap();
        gpu.clear(memory).unwrap();
        Card { stream: gpu.stream().clone(), gpu, memory }
    }

    /// Copies the memory to itself with a launch that `change` has changed, and waits.
    fn launch(&mut self, change: impl FnOnce(&mut Launch)) -> Answer {
        self.launch_at(self.memory.address, change)
    }

    fn launch_at(&mut self, address: u64, change: impl FnOnce(&mut Launch)) -> Answer {
        let mut launch = cuda::launch(&Copy { shape: [ELEMENTS].into() }, Precision::F32, false);
        change(&mut launch);
        // SAFETY: the memory is as long as the launch makes of it; where the address is none, the driver is to say so.
        let begun = unsafe { self.gpu.launch(&launch, |_| address) };
        answer_of(begun.and_then(|()| self.gpu.synchronize()))
    }
}

fn answer_of(result: Result<(), CudaError>) -> Answer {
    match result {
        Ok(()) => Ok(()),
        Err(CudaError::Driver { source, .. }) => Err(source.0),
        Err(other) => panic!("{other}"),
    }
}

pub fn answer<T>(result: Result<T, DriverError>) -> Answer {
    result.map(drop).map_err(|error| error.0)
}

/// Prints all answers, and fails where one is none of those that are expected.
pub fn compare<S: Display>(answers: Vec<(S, Answer, &[Answer])>) {
    let said = |answer: &Answer| answer.map_or_else(|code| format!("{code:?}"), |()| "success".to_string());
    let mut others = Vec::new();
    for (what, found, expected) in answers {
        say(&format!("conformance: {what}: {}", said(&found)));
        if !expected.contains(&found) {
            let expected: Vec<String> = expected.iter().map(said).collect();
            others.push(format!("{what}: {}, expected {}", said(&found), expected.join(" or ")));
        }
    }
    assert!(others.is_empty(), "{}", others.join("\n"));
}

const INVALID: Answer = Err(CUresult::CUDA_ERROR_INVALID_VALUE);
const NO_HANDLE: Answer = Err(CUresult::CUDA_ERROR_INVALID_HANDLE);
const TOO_MUCH: Answer = Err(CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);

#[test]
fn memory_and_devices() {
    with_kernels("conformance::memory_and_devices", || {
        let card = Card::open();
        let none = Gpu::count().unwrap();
        let mut byte = [0];
        let odd = Memory { address: card.memory.address + 5, bytes: 3 };
        compare(vec![
            // "If bytesize is 0, cuMemAlloc() returns CUDA_ERROR_INVALID_VALUE."
            // SAFETY: what comes of it is not used.
            ("allocates nothing", answer(unsafe { result::malloc_sync(0) }), &[INVALID]),
            // "dptr ... must have been returned by a previous call".
            // SAFETY: nobody has that memory.
            (
                "frees what it was not given",
                answer(unsafe { result::free_sync(card.memory.address + 256) }),
                &[INVALID],
            ),
            (
                "opens a device that is not there",
                answer(CudaContext::new(none)),
                &[Err(CUresult::CUDA_ERROR_INVALID_DEVICE)],
            ),
            // SAFETY: both sides are that long.
            ("copies a byte", answer(unsafe { result::memcpy_dtoh_sync(&mut byte, card.memory.address) }), &[Ok(())]),
            // No copy asks for an alignment; kernels do.
            ("copies three bytes to an odd address", answer_of(card.gpu.upload(odd, &[1, 2, 3])), &[Ok(())]),
            ("copies three bytes from an odd address", answer_of(card.gpu.download(odd).map(drop)), &[Ok(())]),
        ]);
        assert_eq!(card.gpu.download(odd).unwrap(), [1, 2, 3]);
    });
}

#[test]
fn launches() {
    with_kernels("conformance::launches", || {
        let mut card = Card::open();
        let mut answers: Vec<(&str, Answer, &[Answer])> = vec![
            ("launches a kernel", card.launch(|_| {}), &[Ok(())]),
            ("a grid without blocks", card.launch(|launch| launch.grid[0] = 0), &[INVALID]),
            ("a block without threads", card.launch(|launch| launch.block[0] = 0), &[INVALID]),
            // A block has 1024 threads at most, 64 along z; a grid 65535 blocks along y and z.
            ("2048 threads", card.launch(|launch| launch.block = [2048, 1, 1]), &[INVALID]),
            ("128 threads along z", card.launch(|launch| launch.block = [1, 1, 128]), &[INVALID]),
            // __launch_bounds__: "the kernel will fail to launch".
            ("more threads than its bound", card.launch(|launch| launch.block = [1024, 1, 1]), &[INVALID, TOO_MUCH]),
            ("a megabyte of shared memory", card.launch(|launch| launch.shared = 1 << 20), &[INVALID]),
            (
                "a kernel that is not there",
                card.launch(|launch| launch.kernel = "none".into()),
                &[Err(CUresult::CUDA_ERROR_NOT_FOUND)],
            ),
        ];
        // None of it has done harm.
        answers.push(("launches a kernel after that", card.launch(|_| {}), &[Ok(())]));
        compare(answers);
    });
}

/// Images stand along y and z.
#[test]
fn a_grid_that_no_card_has_is_refused_in_words() {
    with_kernels("conformance::a_grid_that_no_card_has_is_refused_in_words", || {
        let mut card = Card::open();
        let mut launch = cuda::launch(&Copy { shape: [ELEMENTS].into() }, Precision::F32, false);
        for grid in [[1, 65_536, 1], [1, 1, 65_536], [1 << 31, 1, 1]] {
            launch.grid = grid;
            // SAFETY: nothing is begun.
            let refused = unsafe { card.gpu.launch(&launch, |_| card.memory.address) }.unwrap_err();
            assert!(matches!(refused, CudaError::LargeGrid { .. }), "{refused:?}");
            assert!(refused.to_string().contains("lower `train.batch`"), "{refused}");
        }
    });
}

#[test]
fn events() {
    with_kernels("conformance::events", || {
        let card = Card::open();
        let context = card.stream.context();
        let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let [never, first, second] = [(); 3].map(|()| context.new_event(timed).unwrap());
        let untimed = context.new_event(None).unwrap();
        for event in [&first, &second, &untimed] {
            event.record(&card.stream).unwrap();
        }
        card.stream.synchronize().unwrap();
        compare(vec![
            // "If cuEventRecord() has not been called on hEvent ... success".
            ("waits for an event that was never recorded", answer(never.synchronize()), &[Ok(())]),
            ("asks for it", if never.is_complete() { Ok(()) } else { Err(CUresult::CUDA_ERROR_NOT_READY) }, &[Ok(())]),
            ("measures from it", answer(never.elapsed_ms(&first)), &[NO_HANDLE]),
            ("measures from one without time", answer(untimed.elapsed_ms(&first)), &[NO_HANDLE]),
            ("measures between two", answer(first.elapsed_ms(&second)), &[Ok(())]),
            ("lets a stream wait for one that was never recorded", answer(card.stream.wait(&never)), &[Ok(())]),
        ]);
    });
}

/// Says that a process is the one whose card is to fail: it cannot be used for anything else.
const FAILING: &str = "DDPM_DIST_CUDA_FAILING";

/// "This leaves the process in an inconsistent state and any further CUDA work will return the same error.": what `fails` does is done in a
/// process of its own.
fn nothing_works_after(test: &str, what: &str, lost: CUresult, fails: fn(&mut Card) -> Answer) {
    with_kernels(test, || {
        if std::env::var_os(FAILING).is_none() {
            let mut again = Command::new(std::env::current_exe().unwrap());
            let output = again.args(["--exact", test, "--nocapture"]).env(FAILING, "1").output().unwrap();
            let said =
                format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            said.lines().filter(|line| line.starts_with("conformance: ")).for_each(say);
            assert!(output.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let mut card = Card::open();
        let lost = Err(lost);
        compare(vec![
            (what, fails(&mut card), &[lost]),
            ("a kernel after it", card.launch(|_| {}), &[lost]),
            // SAFETY: the size is not zero.
            ("memory after it", answer(unsafe { result::malloc_sync(256) }), &[lost]),
            ("waits for the stream after it", answer(card.stream.synchronize()), &[lost]),
        ]);
        // Nothing of it can be given back.
        std::mem::forget(card);
    });
}

#[test]
fn after_a_kernel_that_reads_nowhere_nothing_works() {
    nothing_works_after(
        "conformance::after_a_kernel_that_reads_nowhere_nothing_works",
        "a kernel that reads nowhere",
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS,
        // Aligned, and nobody's.
        |card| card.launch_at(1 << 12, |_| {}),
    );
}

/// CUDA_ERROR_MISALIGNED_ADDRESS: "The device encountered a load or store instruction on a memory address which is not aligned."
#[test]
fn after_a_kernel_whose_16_bytes_are_not_aligned_nothing_works() {
    nothing_works_after(
        "conformance::after_a_kernel_whose_16_bytes_are_not_aligned_nothing_works",
        "a kernel whose accesses of 16 bytes begin 4 bytes after a multiple of 16",
        CUresult::CUDA_ERROR_MISALIGNED_ADDRESS,
        |card| card.launch_at(card.memory.address + 4, |_| {}),
    );
}

/// `cudnnBackendNumericalNote_t`, by their numbers.
const NUMERICAL: [&str; 10] = [
    "TENSOR_CORE",
    "DOWN_CONVERT_INPUTS",
    "REDUCED_PRECISION_REDUCTION",
    "FFT",
    "NONDETERMINISTIC",
    "WINOGRAD",
    "WINOGRAD_TILE_4x4",
    "WINOGRAD_TILE_6x6",
    "WINOGRAD_TILE_13x13",
    "STRICT_NAN_PROP",
];
/// `cudnnBackendBehaviorNote_t`, likewise.
const BEHAVIOR: [&str; 5] = [
    "RUNTIME_COMPILATION",
    "REQUIRES_FILTER_INT8x32_REORDER",
    "REQUIRES_BIAS_INT8x32_REORDER",
    "SUPPORTS_CUDA_GRAPH_NATIVE_API",
    "CUBLASLT_DEPENDENCY",
];

/// Engines are refused by what they say of themselves; a note that this program does not know is printed, and is to be decided upon.
#[test]
fn notes_of_engines() {
    run("conformance::notes_of_engines", || {
        let (_gpu, dnn) = open();
        for (pass, precision) in PASSES.into_iter().flat_map(|pass| BOTH.map(|precision| (pass, precision))) {
            let shape = shape(pass, [2, 8, 8, 16], [16, 3, 1], [1, 1], precision);
            let engines = dnn.engine_notes(&shape).unwrap_or_else(|error| panic!("{error}"));
            assert!(engines.iter().any(|notes| notes.fault.is_none()), "{shape}: nothing may be used: {engines:?}");
            for EngineNotes { engine, numerical, behavior, fault } in engines {
                let names = |notes: &[u32], names: &[&str]| -> String {
                    let name = |note: &u32| names.get(*note as usize).map_or(format!("note {note}"), |n| n.to_string());
                    notes.iter().map(name).collect::<Vec<_>>().join(" ")
                };
                let (numerical, behavior) = (names(&numerical, &NUMERICAL), names(&behavior, &BEHAVIOR));
                let fate = fault.map_or("may be used".to_string(), |fault| format!("is refused, as {fault}"));
                say(&format!("conformance: engine {engine} for the {shape} [{numerical}] [{behavior}] {fate}"));
                let has = |note: &str| numerical.split(' ').any(|known| known == note);
                let gives_other_bits = ["NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION", "FFT", "WINOGRAD"].map(has);
                let rounds = ["TENSOR_CORE", "DOWN_CONVERT_INPUTS"].map(has).contains(&true);
                let must_go = gives_other_bits.contains(&true) || rounds && precision == Precision::F32;
                assert_eq!(fault.is_some(), must_go, "engine {engine}: {numerical}");
            }
        }
    });
}
