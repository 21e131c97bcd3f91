//! Builds the machine made of software with the host's C++ compiler; test programs include this file.

use std::path::{Path, PathBuf};
use std::process::Command;

/// What the machine is built as.
#[derive(Clone, Copy)]
#[allow(dead_code, reason = "a test program needs some of them")]
pub enum Build {
    /// A program that checks one launch, under sanitizers, with the kernels that have planted faults.
    Program,
    /// The driver's library with all kernels, for programs that have no sanitizers.
    Driver,
    /// The same without kernels.
    BareDriver,
    /// cuDNN's library.
    Cudnn,
    /// NVIDIA's cuDNN, as far as it needs no GPU.
    CudnnWithoutGpu,
    /// cuBLASLt's library.
    CublasLt,
    /// NCCL's library, between the processes of this machine.
    Nccl,
}

const SANITIZERS: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

impl Build {
    fn sources(self) -> &'static [&'static str] {
        match self {
            Build::Program => &["sim.cpp", "planted.cu"],
            Build::Driver | Build::BareDriver => &["sim.cpp", "driver.cpp"],
            Build::Cudnn => &["cudnn.cpp"],
            Build::CudnnWithoutGpu => &["cudnn_without_gpu.cpp"],
            Build::CublasLt => &["cublaslt.cpp"],
            Build::Nccl => &["nccl.cpp"],
        }
    }

    fn has_kernels(self) -> bool {
        matches!(self, Build::Program | Build::Driver)
    }

    /// For the compiler and the linker.
    fn flags(self) -> &'static [&'static str] {
        match self {
            Build::Program => &SANITIZERS,
            Build::Driver | Build::BareDriver => &["-fPIC", "-shared", "-DCUDA_SIM_LIBRARY"],
            Build::Cudnn | Build::CudnnWithoutGpu | Build::CublasLt | Build::Nccl => &["-fPIC", "-shared", "-O3"],
        }
    }

    fn file(self) -> String {
        match self {
            Build::Program => format!("cuda-sim-{}", std::process::id()),
            Build::Driver | Build::BareDriver => "libcuda.so.1".to_string(),
            Build::Cudnn | Build::CudnnWithoutGpu => "libcudnn.so.9".to_string(),
            Build::CublasLt => "libcublasLt.so.13".to_string(),
            Build::Nccl => "libnccl.so.2".to_string(),
        }
    }
}

/// Puts it into `folder`, and gives its path.
pub fn build(build: Build, folder: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (kernels, sim) = (root.join("kernels"), root.join("tests/cuda-sim"));
    let mut sources: Vec<PathBuf> = match build.has_kernels() {
        true => std::fs::read_dir(&kernels).unwrap().map(|entry| entry.unwrap().path()).collect(),
        false => Vec::new(),
    };
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.extend(build.sources().iter().map(|name| sim.join(name)));
    sources.sort();
    let objects = compile_all(build, &sources, &[&kernels, &sim], folder);
    let file = folder.join(build.file());
    run(Command::new(compiler()).args(build.flags()).args(objects).arg("-o").arg(&file));
    file
}

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_string())
}

/// One object of each source, as many at a time as there are cores.
fn compile_all(build: Build, sources: &[PathBuf], include: &[&Path], folder: &Path) -> Vec<PathBuf> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let object =
        |source: &PathBuf| folder.join(format!("{}-{}.o", source.file_stem().unwrap().display(), std::process::id()));
    for some in sources.chunks(threads) {
        std::thread::scope(|scope| {
            for source in some {
                scope.spawn(move || {
                    let mut command = Command::new(compiler());
                    command.args(["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]);
                    command.args(build.flags().iter().filter(|flag| **flag != "-shared")).arg("-ffp-contract=off");
                    for folder in include {
                        command.arg("-I").arg(folder);
                    }
                    run(command.args(["-x", "c++", "-c"]).arg(source).arg("-o").arg(object(source)));
                });
            }
        });
    }
    sources.iter().map(object).collect()
}

fn run(command: &mut Command) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; a C++ compiler is needed (g++, clang++, or $CXX)"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
