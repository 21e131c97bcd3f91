//! The machine made of software: kernels built by the host's C++ compiler, one process for each launch.

use crate::build::{Build, build};
use crate::machine::Buffer;
use ddpm_dist::device::cuda::{Argument, Launch};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

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
