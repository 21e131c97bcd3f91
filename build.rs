//! Tells the program which commit and which compiler it is made of, for the manifests of its checkpoints, and compiles the CUDA kernels.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// What kernels are compiled for: A100, H100 and H200, B200. Smaller cards of these generations have less shared memory than some launches
/// ask for.
const ARCHITECTURES: [&str; 3] = ["80", "90a", "100"];
/// Of its PTX a driver makes kernels for GPUs that come later.
const LATER: &str = "100";
/// The first nvcc that knows all of these.
const OLDEST_NVCC: [u32; 2] = [12, 8];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src");
    let rustc = env::var("RUSTC").ok().and_then(|rustc| said(&rustc, &["--version"]));
    println!("cargo:rustc-env=DDPM_DIST_RUSTC={}", rustc.as_deref().unwrap_or("unknown"));
    println!("cargo:rustc-env=DDPM_DIST_COMMIT={}", commit().as_deref().unwrap_or("unknown"));
    if let Err(reason) = kernels() {
        eprintln!("{reason}");
        exit(1);
    }
}

/// The commit, marked where the source differs from it; none in a source without git, or inside another project's repository.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| said("git", arguments);
    let here = env::var("CARGO_MANIFEST_DIR").ok()?;
    let root = git(&["rev-parse", "--show-toplevel"])?;
    if Path::new(&root).canonicalize().ok()? != Path::new(&here).canonicalize().ok()? {
        return None;
    }
    // The log of HEAD grows with every commit and checkout.
    for file in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", file]).filter(|path| Path::new(path).exists());
        path.iter().for_each(|path| println!("cargo:rerun-if-changed={path}"));
    }
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let is_changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| !text.is_empty());
    Some(if is_changed { commit + "-changed" } else { commit })
}

/// What a command prints, if it ends well.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_string())
}

/// An nvcc that can compile the kernels.
struct Nvcc {
    path: String,
    /// `nvcc 13.0.88`
    version: String,
}

/// Compiles kernels/*.cu to one image for all architectures, `kernels.fatbin`. Where there is no nvcc it is empty, and the build says so.
///
/// # Errors
/// Kernels that do not compile, or a disk that cannot be written.
fn kernels() -> Result<(), String> {
    // Not the places where nvcc might appear: docs/kernels.md says why.
    println!("cargo:rerun-if-changed=kernels");
    for name in ["NVCC", "CUDA_HOME", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let out = PathBuf::from(env::var("OUT_DIR").map_err(|e| format!("OUT_DIR: {e}"))?);
    let image = out.join("kernels.fatbin");
    let nvcc = match find_nvcc() {
        Ok(nvcc) => nvcc,
        Err(reason) => {
            if let Some(reason) = reason {
                println!("cargo:warning=built without CUDA kernels: {reason}");
            }
            println!("cargo:rustc-env=DDPM_DIST_NVCC=");
            println!("cargo:rustc-env=DDPM_DIST_ARCHITECTURES=");
            return write(&image, "");
        }
    };
    println!("cargo:rustc-env=DDPM_DIST_NVCC={}", nvcc.version);
    let names = ARCHITECTURES.map(|architecture| format!("sm_{architecture}")).join(" ");
    println!("cargo:rustc-env=DDPM_DIST_ARCHITECTURES={names} compute_{LATER}");

    let sources = sources()?;
    let whole = out.join("kernels.cu");
    let arguments = arguments(&whole, &image);
    // The script runs for every change of the crate; nvcc only for one that matters to it.
    let stamp = out.join("kernels.stamp");
    let mut made_of = format!("{} {arguments:?}\n", nvcc.version);
    for path in &sources {
        made_of += &fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let is_there = fs::metadata(&image).is_ok_and(|image| image.len() > 0);
    if is_there && fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == made_of) {
        return Ok(());
    }
    write(&whole, &in_one_piece(&sources))?;
    let compiled = Command::new(&nvcc.path).args(&arguments).output().map_err(|e| format!("{}: {e}", nvcc.path))?;
    if !compiled.status.success() {
        let said =
            [compiled.stdout, compiled.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        return Err(format!("{} cannot compile the kernels (NVCC=none builds without them):\n{said}", nvcc.path));
    }
    write(&stamp, &made_of)
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))
}

/// The nvcc that kernels/find-nvcc finds, or why there is none; `NVCC=none` wants none.
fn find_nvcc() -> Result<Nvcc, Option<String>> {
    if env::var("NVCC").is_ok_and(|nvcc| nvcc == "none") {
        return Err(None);
    }
    let found = Command::new("kernels/find-nvcc").output().map_err(|e| Some(format!("kernels/find-nvcc: {e}")))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    if !found.status.success() {
        return Err(Some(text(&found.stderr)));
    }
    let path = text(&found.stdout);
    let said = said(&path, &["--version"]).unwrap_or_default();
    // "Cuda compilation tools, release 13.0, V13.0.88"
    let version = said.split_whitespace().find_map(|word| word.strip_prefix('V')).unwrap_or_default();
    let mut numbers = version.split('.').map_while(|number| number.parse().ok());
    let release = [numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)];
    if release < OLDEST_NVCC {
        let [major, minor] = OLDEST_NVCC;
        return Err(Some(format!("{path} is version `{version}`, and {major}.{minor} or later is needed")));
    }
    Ok(Nvcc { path, version: format!("nvcc {version}") })
}

/// Headers, then kernels, by name.
fn sources() -> Result<Vec<PathBuf>, String> {
    let entries = fs::read_dir("kernels").map_err(|e| format!("kernels: {e}"))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.retain(|path| is_kernel(path) || path.extension().is_some_and(|extension| extension == "cuh"));
    paths.sort_by_key(|path| (is_kernel(path), path.clone()));
    Ok(paths)
}

fn is_kernel(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "cu")
}

/// A source that includes all others, each kernel in a namespace of its own: their helpers share names.
fn in_one_piece(sources: &[PathBuf]) -> String {
    let include = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        match is_kernel(path) {
            true => format!("namespace {} {{\n#include \"{name}\"\n}}\n", name.replace('.', "_")),
            false => format!("#include \"{name}\"\n"),
        }
    };
    sources.iter().map(include).collect()
}

fn arguments(source: &Path, image: &Path) -> Vec<String> {
    let real = ARCHITECTURES.map(|architecture| format!("arch=compute_{architecture},code=sm_{architecture}"));
    let targets = real.into_iter().chain([format!("arch=compute_{LATER},code=compute_{LATER}")]);
    let mut arguments: Vec<String> =
        ["-std=c++17", "-O3", "--threads=0", "-fatbin", "-I", "kernels"].map(String::from).into();
    arguments.extend(targets.flat_map(|target| ["-gencode".to_string(), target]));
    arguments.extend([source, &PathBuf::from("-o"), image].map(|path| path.display().to_string()));
    arguments
}
