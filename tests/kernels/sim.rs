//! The machine made of software: kernels built by the host's C++ compiler, one process for each launch.

use crate::machine::Buffer;
use ddpm_dist::device::cuda::{Argument, Launch};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// What the machine is built as.
#[derive(Clone, Copy)]
enum Build {
    /// A program that checks one launch, under sanitizers, with the kernels that have planted faults.
    Program,
    /// The driver's library, for programs that have no sanitizers.
    Library,
}

const SANITIZERS: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

impl Build {
    fn sources(self) -> &'static [&'static str] {
        match self {
            Build::Program => &["sim.cpp", "planted.cu"],
            Build::Library => &["sim.cpp", "driver.cpp"],
        }
    }

    /// For the compiler and the linker.
    fn flags(self) -> &'static [&'static str] {
        match self {
            Build::Program => &SANITIZERS,
            Build::Library => &["-fPIC", "-shared", "-DCUDA_SIM_LIBRARY"],
        }
    }

    fn file(self) -> String {
        match self {
            Build::Program => format!("cuda-sim-{}", std::process::id()),
            Build::Library => "libcuda.so.1".to_string(),
        }
    }
}

/// All kernels of kernels/ and the machine, in `folder`.
fn build(build: Build, folder: &Path) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (kernels, sim) = (root.join("kernels"), root.join("tests/cuda-sim"));
    let mut sources: Vec<PathBuf> = std::fs::read_dir(&kernels).unwrap().map(|entry| entry.unwrap().path()).collect();
    sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    sources.extend(build.sources().iter().map(|name| sim.join(name)));
    sources.sort();
    let objects = compile_all(build, &sources, &[&kernels, &sim], folder);
    let file = folder.join(build.file());
    run(Command::new(compiler()).args(build.flags()).args(objects).arg("-o").arg(&file));
    file
}

fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| build(Build::Program, Path::new(env!("CARGO_TARGET_TMPDIR"))))
}

/// All kernels of kernels/ by name, with the bytes of each argument.
pub fn kernels() -> BTreeMap<String, Vec<usize>> {
    let said = Command::new(program()).arg("kernels").output().unwrap().stdout;
    let kernel = |line: &str| {
        let mut words = line.split(' ');
        let name = words.next().unwrap().to_string();
        (name, words.map(|bytes| bytes.parse().unwrap()).collect())
    };
    String::from_utf8(said).unwrap().lines().map(kernel).filter(|(name, _)| !name.starts_with("planted_")).collect()
}

/// Puts the driver's library of the machine into a folder.
pub fn build_driver(folder: &Path) {
    build(Build::Library, folder);
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

/// Runs a launch; gives what its outputs and updated buffers hold, in the order of its arguments, or what is wrong with it. A workspace is
/// an output of the launch that writes it, and an input of the next.
pub fn try_launch(
    launch: &Launch,
    inputs: &[Buffer],
    outputs: &[Buffer],
    workspace: &Buffer,
) -> Result<Vec<Vec<u8>>, String> {
    let mut request = Vec::new();
    let mut word = |bytes: &[u8]| request.extend_from_slice(bytes);
    word(&(launch.kernel.len() as u64).to_le_bytes());
    word(launch.kernel.as_bytes());
    for number in launch.grid.iter().chain(&launch.block).chain([&launch.shared, &launch.arguments.len()]) {
        word(&u32::try_from(*number).unwrap().to_le_bytes());
    }
    let mut lengths = Vec::new();
    for argument in &launch.arguments {
        let buffer = match argument {
            Argument::Input(place) => &inputs[*place],
            Argument::Output(place) => &outputs[*place],
            Argument::Scratch => workspace,
            Argument::Null => &Buffer::Input(vec![0; 8]),
            Argument::Value(bytes) => &Buffer::Input(bytes.clone()),
        };
        let is_value = matches!(argument, Argument::Null | Argument::Value(_));
        let (kind, length, content) = match buffer {
            Buffer::Input(content) => (if is_value { 0u32 } else { 1 }, content.len(), &content[..]),
            Buffer::Output(length) => (2, *length, &[][..]),
            Buffer::Updated(content) => (3, content.len(), &content[..]),
        };
        word(&kind.to_le_bytes());
        word(&(length as u64).to_le_bytes());
        word(content);
        if kind >= 2 {
            lengths.push(length);
        }
    }
    let mut machine = Command::new(program())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("ASAN_OPTIONS", "detect_stack_use_after_return=0:detect_leaks=0")
        .spawn()
        .unwrap();
    let mut stdin = machine.stdin.take().unwrap();
    // A machine that refuses early does not read all of it.
    let writer = std::thread::spawn(move || stdin.write_all(&request).is_ok());
    let output = machine.wait_with_output().unwrap();
    writer.join().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let mut rest = &output.stdout[..];
    let buffers = lengths.into_iter().map(|length| rest.split_off(..length).unwrap().to_vec()).collect();
    assert!(rest.is_empty(), "{} bytes too many", rest.len());
    Ok(buffers)
}
