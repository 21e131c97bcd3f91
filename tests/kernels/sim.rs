//! The machine made of software: kernels built by the host's C++ compiler, one process for each launch.

use ddpm_dist::device::cuda::{Argument, Launch};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// A buffer of a launch.
#[derive(Clone, Debug)]
pub enum Buffer {
    /// Read only.
    Input(Vec<u8>),
    /// So many bytes, all of which the kernel must write.
    Output(usize),
    /// Read and written.
    Updated(Vec<u8>),
}

/// All kernels of kernels/, and those with planted faults.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (kernels, sim) = (root.join("kernels"), root.join("tests/cuda-sim"));
        let mut sources: Vec<PathBuf> =
            std::fs::read_dir(&kernels).unwrap().map(|entry| entry.unwrap().path()).collect();
        sources.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
        sources.push(sim.join("planted.cu"));
        sources.push(sim.join("sim.cpp"));
        sources.sort();
        let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let objects = build_all(&sources, &[&kernels, &sim], &target);
        let program = target.join(format!("cuda-sim-{}", std::process::id()));
        run(Command::new(compiler()).args(SANITIZERS).args(objects).arg("-o").arg(&program));
        program
    })
}

const SANITIZERS: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".to_string())
}

/// One object of each source, as many at a time as there are cores.
fn build_all(sources: &[PathBuf], include: &[&Path], target: &Path) -> Vec<PathBuf> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let object =
        |source: &PathBuf| target.join(format!("{}-{}.o", source.file_stem().unwrap().display(), std::process::id()));
    for some in sources.chunks(threads) {
        std::thread::scope(|scope| {
            for source in some {
                scope.spawn(move || {
                    let mut command = Command::new(compiler());
                    command.args(["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]);
                    command.args(SANITIZERS).arg("-ffp-contract=off");
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

/// As [`try_launch`], of a launch that must be well.
#[track_caller]
pub fn run_launch(launch: &Launch, inputs: &[Buffer], outputs: &[Buffer]) -> Vec<Vec<u8>> {
    run_with(launch, inputs, outputs, &Buffer::Output(0))
}

/// The same with a workspace.
#[track_caller]
pub fn run_with(launch: &Launch, inputs: &[Buffer], outputs: &[Buffer], workspace: &Buffer) -> Vec<Vec<u8>> {
    try_launch(launch, inputs, outputs, workspace).unwrap_or_else(|error| panic!("{launch:?}: {error}"))
}
