//! Runs tests where there are CUDA libraries: this program once more, with the libraries of the machine made of software before all others.

use crate::build::{Build, build};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// A variable of the environment, and its value.
pub type Setting = (&'static str, &'static str);

/// Says which case of a test a process is for.
const CASE: &str = "DDPM_DIST_CUDA_CASE";

/// Runs `body` for each case in a process of its own, with the case's settings. `test` is the name of the test that calls this.
pub fn run_cases<T>(test: &str, libraries: &[Build], cases: &[(&[Setting], T)], body: impl Fn(&T)) {
    if let Ok(case) = std::env::var(CASE) {
        return body(&cases[case.parse::<usize>().unwrap()].1);
    }
    if std::env::var("DDPM_DIST_KERNELS").is_ok_and(|place| place == "gpu") {
        let is_real = |(settings, _): &&(&[Setting], T)| settings.is_empty();
        if libraries.len() >= ALL.len() && cases.iter().any(|case| is_real(&case)) {
            return cases.iter().filter(is_real).for_each(|(_, case)| body(case));
        }
        return not_tested(&format!("{test}: its faults are those of the machine made of software"));
    }
    let path = library_path(libraries);
    for (i, (settings, _)) in cases.iter().enumerate() {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", test, "--nocapture"]).env("LD_LIBRARY_PATH", &path).env(CASE, i.to_string());
        // What one test finds to be fast is not what another computes with.
        again.env("DDPM_DIST_CUDA_PLANS", "off");
        let output = again.envs(settings.iter().copied()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("1 passed"), "case {i}, {settings:?}: {said}");
        assert!(!said.contains("left when the context went"), "case {i}, {settings:?}: {said}");
        // What was not tested there is said here.
        said.lines().filter(|line| line.starts_with("NOT TESTED")).for_each(say);
    }
}

/// The driver, without kernels, and cuDNN.
pub const ALL: [Build; 2] = [Build::BareDriver, Build::Cudnn];

/// The driver with this program's kernels, and all libraries.
pub const WITH_KERNELS: [Build; 3] = [Build::Driver, Build::Cudnn, Build::CublasLt];

/// [`run_cases`] of a test that needs all libraries, and no settings.
pub fn run(test: &str, body: impl Fn()) {
    run_cases(test, &ALL, &[(&[], ())], |()| body());
}

/// What the loader is to be told, so that it finds these libraries.
pub fn library_path(libraries: &[Build]) -> OsString {
    std::env::join_paths(libraries.iter().map(|library| folder_of(*library))).unwrap()
}

/// Says that something was not tested.
pub fn not_tested(what: &str) {
    say(&format!("NOT TESTED: {what}"));
}

/// Says it past the harness, which keeps what a test prints that passes.
pub fn say(line: &str) {
    // Nothing could be done about it.
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Where a library of the machine is, under the names that are looked for first.
fn folder_of(library: Build) -> &'static Path {
    static BUILT: [OnceLock<PathBuf>; 6] = [const { OnceLock::new() }; 6];
    let (i, name) = match library {
        Build::BareDriver => (0, "libcuda.so"),
        Build::Driver => (1, "libcuda.so"),
        Build::Cudnn => (2, "libcudnn.so"),
        Build::CublasLt => (3, "libcublasLt.so"),
        Build::Nccl => (4, "libnccl.so.2"),
        Build::CudnnWithoutGpu => (5, "libcudnn.so"),
        Build::Program => unreachable!("it is no library"),
    };
    BUILT[i].get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("library-{i}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = build(library, &folder);
        if !file.ends_with(name) {
            std::os::unix::fs::symlink(file.file_name().unwrap(), folder.join(name)).unwrap();
        }
        folder
    })
}

/// Not a test: `cargo test --release --test cuda -- --ignored --nocapture machine::for_the_program`.
#[test]
#[ignore = "builds the machine for the program to be run on it by hand, and prints where it is"]
fn for_the_program() {
    let libraries = [Build::Driver, Build::Cudnn, Build::CublasLt, Build::Nccl];
    println!("LD_LIBRARY_PATH={}", library_path(&libraries).display());
}
