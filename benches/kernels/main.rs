//! Every kernel at shapes of the models, on a GPU: its time, and what it reaches of the card's copy bandwidth or matrix rate, which are
//! measured in the same run.
//!
//! `cargo bench --bench kernels -- [part of a name]`
//!
//! Medians over the GPU's own clock. Bytes are those that a kernel must move, each operand once; it moves them through memory where they are
//! far more than the card's cache, as in the shapes of 256 MB and more. Inputs are random.

mod cases;

use cases::{Case, Content};
use cudarc::cublaslt::{CudaBlasLT, Matmul, MatmulConfig};
use ddpm_dist::device::cuda::{Argument, CudaError, Gpu, Memory};
use ddpm_dist::rng::{Kind, Stream};
use half::bf16;
use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

const WARM_UPS: usize = 3;
const ROUNDS: usize = 21;
/// Repetitions between two readings of the GPU's clock: what the host does before the first of them counts little.
const REPETITIONS: u32 = 20;
/// Bytes of the copy that measures bandwidth.
const COPY: usize = 2 << 30;
/// Rows, columns and depth of the product that measures the matrix rate.
const PRODUCT: usize = 8192;

fn main() -> ExitCode {
    match measure_all() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn measure_all() -> Result<(), Box<dyn Error>> {
    let filter = std::env::args().skip(1).find(|argument| !argument.starts_with("--")).unwrap_or_default();
    let mut gpu = Gpu::open(0)?;
    let bandwidth = copy_bandwidth(&mut gpu)?;
    println!("{}: a copy moves {:.0} GB/s, read and written", gpu.name()?, bandwidth / 1e9);
    let rate = match matrix_rate(&gpu) {
        Ok(rate) => {
            println!("a bf16 product of {PRODUCT}³ runs at {:.0} TFLOP/s (cuBLASLt)", rate / 1e12);
            Some(rate)
        }
        Err(reason) => {
            println!("no bf16 product to compare with: {reason}");
            None
        }
    };
    let cases: Vec<Case> = cases::all().into_iter().filter(|case| case.name.contains(&filter)).collect();
    if cases.is_empty() {
        return Ok(());
    }
    println!("\n| kernel | shape | µs | GB/s | of a copy | TFLOP/s | of a product |\n|---|---|---|---|---|---|---|");
    for case in &cases {
        let seconds = measure(&mut gpu, case)?.as_secs_f64();
        let (bytes, products) = (case.bytes as f64 / seconds, case.products as f64 / seconds);
        let percent = |part: f64| format!("{:.0} %", 100.0 * part);
        let moved = [format!("{:.0}", bytes / 1e9), percent(bytes / bandwidth)];
        let computed = match (case.products, rate) {
            (0, _) => [String::new(), String::new()],
            (_, None) => [format!("{:.1}", products / 1e12), String::new()],
            (_, Some(rate)) => [format!("{:.1}", products / 1e12), percent(products / rate)],
        };
        let (name, shape) = (&case.name, &case.shape);
        println!("| `{name}` | {shape} | {:.1} | {} | {} |", 1e6 * seconds, moved.join(" | "), computed.join(" | "));
    }
    Ok(())
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn repeat<E>(mut work: impl FnMut() -> Result<(), E>) -> Result<(), E> {
    (0..REPETITIONS).try_for_each(|_| work())
}

/// Bytes read and written in a second.
fn copy_bandwidth(gpu: &mut Gpu) -> Result<f64, CudaError> {
    let [from, to] = [gpu.allocate(COPY)?, gpu.allocate(COPY)?];
    gpu.upload(from, &random(&Content::Bytes(COPY)))?;
    let mut times = Vec::new();
    for _ in 0..WARM_UPS + ROUNDS {
        times.push(gpu.time(|gpu| repeat(|| gpu.copy(from, to)))? / REPETITIONS);
    }
    gpu.free(from)?;
    gpu.free(to)?;
    Ok(2.0 * COPY as f64 / median(times.split_off(WARM_UPS)).as_secs_f64())
}

/// FLOPs of a large bf16 product in a second.
fn matrix_rate(gpu: &Gpu) -> Result<f64, Box<dyn Error>> {
    // SAFETY: it loads a library that has no requirements at loading.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Err("there is no libcublasLt".into());
    }
    let stream = gpu.stream();
    let library = CudaBlasLT::new(stream.clone()).map_err(|e| e.to_string())?;
    let values = |seed| -> Vec<bf16> { normals(seed, PRODUCT * PRODUCT).into_iter().map(bf16::from_f32).collect() };
    let [a, b] = [stream.clone_htod(&values(1))?, stream.clone_htod(&values(2))?];
    let mut c = stream.alloc_zeros::<bf16>(PRODUCT * PRODUCT)?;
    let n = PRODUCT as u64;
    let config = || MatmulConfig {
        transa: true,
        transb: false,
        transc: false,
        m: n,
        n,
        k: n,
        alpha: 1.0,
        beta: 0.0,
        lda: n as i64,
        ldb: n as i64,
        ldc: n as i64,
        stride_a: None,
        stride_b: None,
        stride_c: None,
        stride_bias: None,
        batch_size: None,
    };
    let flags = Some(cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT);
    let mut times = Vec::new();
    for _ in 0..WARM_UPS + ROUNDS {
        let start = stream.record_event(flags)?;
        // SAFETY: the matrices have the sizes that the configuration names.
        repeat(|| unsafe { library.matmul(config(), &a, &b, &mut c, None, None) }).map_err(|e| e.to_string())?;
        let end = stream.record_event(flags)?;
        times.push(Duration::from_secs_f64(f64::from(start.elapsed_ms(&end)?) / 1e3) / REPETITIONS);
    }
    Ok(2.0 * (PRODUCT as f64).powi(3) / median(times.split_off(WARM_UPS)).as_secs_f64())
}

/// The median time of all launches of a case.
fn measure(gpu: &mut Gpu, case: &Case) -> Result<Duration, CudaError> {
    let [inputs, outputs] = [&case.inputs, &case.outputs].map(|contents| -> Result<Vec<Memory>, CudaError> {
        contents
            .iter()
            .map(|content| {
                let bytes = random(content);
                let memory = gpu.allocate(bytes.len())?;
                gpu.upload(memory, &bytes)?;
                Ok(memory)
            })
            .collect()
    });
    let (inputs, outputs, scratch) = (inputs?, outputs?, gpu.allocate(case.scratch)?);
    let address = |argument: &Argument| match argument {
        Argument::Input(i) => inputs[*i].address,
        Argument::Output(i) => outputs[*i].address,
        _ => scratch.address,
    };
    let mut times = Vec::new();
    for _ in 0..WARM_UPS + ROUNDS {
        let work = |gpu: &mut Gpu| {
            // SAFETY: the case gives each buffer the size that its launches ask for.
            repeat(|| case.launches.iter().try_for_each(|launch| unsafe { gpu.launch(launch, address) }))
        };
        times.push(gpu.time(work)? / REPETITIONS);
    }
    for memory in inputs.into_iter().chain(outputs).chain([scratch]) {
        gpu.free(memory)?;
    }
    Ok(median(times.split_off(WARM_UPS)))
}

fn normals(seed: u64, len: usize) -> Vec<f32> {
    let mut values = vec![0.0; len];
    Stream { seed, kind: Kind::Init, layer: 0, sample: 0, step: 0 }.fill_normal(0, &mut values);
    values
}

/// The bytes of a buffer. What is random repeats after some MiB, which no kernel notices.
fn random(content: &Content) -> Vec<u8> {
    const PERIOD: usize = 1 << 20;
    let period: Vec<u8> = match content {
        Content::F32(_) => normals(3, PERIOD).iter().flat_map(|x| x.to_ne_bytes()).collect(),
        Content::Bf16(_) => normals(4, PERIOD).iter().flat_map(|x| bf16::from_f32(*x).to_ne_bytes()).collect(),
        Content::Bytes(_) => normals(5, PERIOD).iter().map(|x| x.to_bits() as u8).collect(),
        Content::Squares(_) => normals(6, PERIOD).iter().flat_map(|x| (x * x).to_ne_bytes()).collect(),
        Content::Exactly(bytes) => return bytes.clone(),
    };
    let mut repeated = period.repeat(content.bytes().div_ceil(period.len()));
    repeated.truncate(content.bytes());
    repeated
}
