//! `ddpm-dist doctor`

mod libraries;
mod machine;

use super::Common;
use super::exit::Failure;
use super::stdout::print;
use crate::device::cuda::{Cuda, CudaError, Image, nccl};
use crate::files::user_cache_dir;
use crate::simd::{self, Level};
use crate::tape::human_bytes;
use libraries::{Places, Search};
use std::path::Path;
use std::process::ExitCode;

/// Below this much memory the paper's CIFAR-10 model does not train at a batch that is worth it.
const LITTLE_MEMORY: u64 = 2 << 30;
/// Below this much disk a few checkpoints of that model (0.55 GiB each) do not fit.
const LITTLE_DISK: u64 = 2 << 30;

/// One line of the report.
struct Finding {
    subject: &'static str,
    found: String,
    /// What is wrong and what to do about it, if anything is.
    advice: Option<String>,
}

/// Something that is as it should be.
fn ok(subject: &'static str, found: impl Into<String>) -> Finding {
    Finding { subject, found: found.into(), advice: None }
}

/// Something that is not.
fn warning(subject: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding { subject, found: found.into(), advice: Some(advice.into()) }
}

pub(super) fn run(common: &Common) -> Result<ExitCode, Failure> {
    let mut findings = vec![cores(), threads(common), vectors(), memory()];
    findings.extend(accelerator());
    findings.push(current_dir());
    findings.push(cache_dir());

    let mut text =
        format!("ddpm-dist {} on {} {}\n\n", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH);
    for Finding { subject, found, advice } in &findings {
        let mark = if advice.is_some() { "warning" } else { "ok" };
        text += &format!("{mark:7}  {subject:17}  {found}\n");
        if let Some(advice) = advice {
            text += &format!("{:28}→ {advice}\n", "");
        }
    }
    let warnings = findings.iter().filter(|finding| finding.advice.is_some()).count();
    text += &match warnings {
        0 => "\nEverything that training needs is here.\n".to_string(),
        1 => "\nOne of the lines above calls for attention.\n".to_string(),
        _ => format!("\n{warnings} of the lines above call for attention.\n"),
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn cores() -> Finding {
    let number = |n: Option<usize>| n.map_or("unknown".to_string(), |n| n.to_string());
    let (online, allowed, limit) = (machine::online_cores(), machine::affinity(), machine::cgroup_cores());
    let limit_text = limit.map_or("no cgroup limit".to_string(), |cores| format!("cgroup limit {cores:.2}"));
    let model = machine::cpu_model().map_or(String::new(), |model| format!(" ({model})"));
    let found = format!("{} online, {} by affinity, {limit_text}{model}", number(online), number(allowed));
    match limit {
        Some(cores) if cores < 1.0 => warning(
            "cores",
            found,
            "the cgroup grants less than one core: raise its CPU limit (docker --cpus, Kubernetes resources.limits.cpu)",
        ),
        _ => ok("cores", found),
    }
}

fn threads(common: &Common) -> Finding {
    let (threads, available) = (common.threads(1.0), super::available_threads());
    let found = format!("{threads} will compute");
    if threads > available {
        let advice = format!("more threads than the {available} available cores are slower: leave --threads out");
        return warning("threads", found, advice);
    }
    ok("threads", if threads < available { format!("{found}, of {available} possible") } else { found })
}

fn vectors() -> Finding {
    let level = simd::level().name();
    match simd::allowed() {
        Ok(Some(most @ (Level::Portable | Level::Avx2))) if most.name() == level => warning(
            "SIMD",
            format!("{level}, the most that DDPM_DIST_SIMD={level} allows"),
            "unset DDPM_DIST_SIMD to use the best instructions of this machine",
        ),
        Err(unknown) => warning(
            "SIMD",
            format!("{level}; DDPM_DIST_SIMD={} is unknown, and every other command refuses it", unknown.found),
            "DDPM_DIST_SIMD is portable, avx2 or avx512; unset it",
        ),
        _ if level == "portable" && cfg!(target_arch = "x86_64") => warning(
            "SIMD",
            "portable: this processor (or virtual machine) has no AVX2",
            "training is several times slower than with AVX2; virtual machines often hide it (-cpu host shows it)",
        ),
        _ => ok("SIMD", level),
    }
}

fn memory() -> Finding {
    let Some((total, available)) = machine::memory() else {
        return ok("memory", "unknown on this system; `ddpm-dist plan CONFIG` shows what a config needs");
    };
    let limit = machine::cgroup_memory().filter(|&limit| limit < total);
    let limit_text =
        limit.map_or("no cgroup limit".to_string(), |limit| format!("cgroup limit {}", human_bytes(limit)));
    let found = format!("{} available of {}, {limit_text}", human_bytes(available), human_bytes(total));
    if limit.unwrap_or(total).min(available) < LITTLE_MEMORY {
        let advice = "`ddpm-dist plan CONFIG` shows what a config needs; lower train.batch if that is more";
        return warning("memory", found, advice);
    }
    ok("memory", found)
}

/// What commands compute on if they are not told, and the parts of an NVIDIA system, of which a missing one matters only where there is a GPU.
fn accelerator() -> Vec<Finding> {
    let has_gpu = Path::new("/dev/nvidia0").exists() || Path::new("/dev/dxg").exists();
    let driver = std::fs::read_to_string("/proc/driver/nvidia/version").ok();
    let places = Places::new();
    let library = |subject, names: &[&str], missing: &str| match places.find(names) {
        Search::Found(path) => ok(subject, path.display().to_string()),
        Search::Unseen(path) => {
            let dir = path.parent().unwrap_or(Path::new("/")).display().to_string();
            let advice = format!("the loader does not look there: add {dir} to LD_LIBRARY_PATH");
            warning(subject, path.display().to_string(), advice)
        }
        Search::Unusable(path, why) => {
            warning(subject, format!("{}: {why}", path.display()), format!("replace or remove it; {missing}"))
        }
        Search::Absent => {
            let found = format!("{} is in none of {} folders", names.join(" or "), places.count());
            match has_gpu {
                true => warning(subject, found, missing),
                false => ok(subject, format!("{found}; not needed without a GPU")),
            }
        }
    };
    let driver_missing = match driver {
        Some(_) => "the kernel's driver is there and its library is not: start the container with --gpus all",
        None => "install NVIDIA's driver; in a container start it with --gpus all",
    };
    let gpu = Cuda::open(0);
    let mut nccl = library(
        "NCCL",
        &["libnccl.so.2"],
        "`pip install nvidia-nccl-cu13`, and add its folder to LD_LIBRARY_PATH; one GPU works without",
    );
    // It is loaded only beside a GPU that works, where a run would load it too.
    if gpu.is_ok() && matches!(places.find(&["libnccl.so.2"]), Search::Found(_)) {
        nccl = with_version(nccl);
    }
    vec![
        device(&gpu, has_gpu, driver.as_deref().and_then(driver_version)),
        library("CUDA driver", &["libcuda.so.1"], driver_missing),
        library(
            "cuBLASLt",
            &["libcublasLt.so.13"],
            "`pip install nvidia-cublas==13.*` or install the CUDA toolkit 13, and add its folder to LD_LIBRARY_PATH",
        ),
        library(
            "cuDNN",
            &["libcudnn.so.9"],
            "`pip install nvidia-cudnn-cu13` or install cuDNN 9, and add its folder to LD_LIBRARY_PATH",
        ),
        library(
            "NVRTC",
            &["libnvrtc.so.13"],
            "`pip install nvidia-cuda-nvrtc==13.*`, and add its folder to LD_LIBRARY_PATH; without it cuDNN has fewer engines to choose from",
        ),
        nccl,
        kernels(Image::embedded(), has_gpu),
    ]
}

/// NCCL where it was found: what ranks can share depends on its version.
fn with_version(nccl: Finding) -> Finding {
    match nccl::version() {
        Ok(version) => ok(nccl.subject, format!("{}, version {version}", nccl.found)),
        Err(error) => warning(nccl.subject, nccl.found, format!("GPUs do not add up with it: {error}")),
    }
}

/// What `--device auto` chooses.
fn device(gpu: &Result<Cuda, CudaError>, has_gpu: bool, driver: Option<&str>) -> Finding {
    let there = match (has_gpu, driver) {
        (false, _) => String::new(),
        (true, None) => "; an NVIDIA GPU is there".to_string(),
        (true, Some(version)) => format!("; an NVIDIA GPU is there (driver {version})"),
    };
    match gpu {
        Ok(cuda) => match cuda.untested() {
            Ok(untested) if untested.is_empty() => ok("device", cuda.describe()),
            Ok(untested) => warning("device", cuda.describe(), untested.join("; ")),
            Err(error) => warning("device", cuda.describe(), error.to_string()),
        },
        Err(error) if error.is_absence() && !has_gpu => ok("device", "CPU cores"),
        Err(error) => warning("device", format!("CPU cores{there}"), format!("no GPU is used: {error}")),
    }
}

/// `570.86.15` from the kernel driver's line `NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  …`.
fn driver_version(text: &str) -> Option<&str> {
    let is_version = |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    text.lines().next()?.split_whitespace().find(is_version)
}

fn kernels(image: Option<Image>, has_gpu: bool) -> Finding {
    let subject = "CUDA kernels";
    match image {
        Some(Image { fatbin, compiler, architectures }) => {
            let size = human_bytes(fatbin.len() as u64);
            ok(subject, format!("{architectures}, compiled by {compiler}, {size}"))
        }
        None if has_gpu => warning(
            subject,
            "none: there was no nvcc where this program was built",
            "install the CUDA toolkit 12.8 or later, or name its nvcc in NVCC, and build again",
        ),
        None => ok(subject, "none: there was no nvcc where this program was built; not needed without a GPU"),
    }
}

fn current_dir() -> Finding {
    match std::env::current_dir() {
        Ok(dir) => {
            let advice = "runs are written below it (runs/): change to a directory with room, or give --run-dir";
            folder("current directory", &dir, advice)
        }
        Err(error) => warning("current directory", format!("unknown: {error}"), "change to a directory that exists"),
    }
}

fn cache_dir() -> Finding {
    let advice =
        "decoded pixels stay in memory instead; set data.cache_dir (or XDG_CACHE_HOME) to a directory with room";
    match user_cache_dir() {
        Some(dir) => folder("data cache", &dir, advice),
        None => warning("data cache", "neither XDG_CACHE_HOME nor HOME is set", advice),
    }
}

fn folder(subject: &'static str, dir: &Path, advice: &str) -> Finding {
    let room = machine::room(dir);
    let free = room.free.map_or("free space unknown".to_string(), |free| format!("{} free", human_bytes(free)));
    let state = match &room.refused {
        Some(error) => format!("cannot be written ({}: {error})", room.exists.display()),
        None if room.exists == dir => "writable".to_string(),
        None => "will be made".to_string(),
    };
    let found = format!("{}: {state}, {free}", dir.display());
    if room.refused.is_some() || room.free.is_some_and(|free| free < LITTLE_DISK) {
        return warning(subject, found, advice);
    }
    ok(subject, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn driver_versions() {
        let line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan  1 00:00:00 UTC 2025\nGCC version: 12.2.0";
        assert_eq!(driver_version(line), Some("570.86.15"));
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build";
        assert_eq!(driver_version(open), Some("580.65.06"));
        assert_eq!(driver_version(""), None);
    }

    #[test]
    fn kernels_are_missed_where_there_is_a_gpu() {
        let image = Image { fatbin: &[0; 2048], compiler: "nvcc 13.0.88", architectures: "sm_80 compute_80" };
        let Finding { found, advice, .. } = kernels(Some(image), true);
        assert_eq!((&*found, advice), ("sm_80 compute_80, compiled by nvcc 13.0.88, 2.00 KiB", None));
        assert!(kernels(None, true).advice.is_some_and(|advice| advice.contains("build again")));
        assert!(kernels(None, false).advice.is_none());
    }
}
