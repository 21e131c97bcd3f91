//! What Linux tells about cores, memory and folders. Elsewhere the answers are `None`.

use std::fs;
use std::path::{Path, PathBuf};

/// Cores that are switched on.
pub(super) fn online_cores() -> Option<usize> {
    count_list(&fs::read_to_string("/sys/devices/system/cpu/online").ok()?)
}

/// Number of members of a list like `0-3,8`.
fn count_list(list: &str) -> Option<usize> {
    let mut count = 0;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        count += last.checked_sub(first)? + 1;
    }
    Some(count)
}

/// Cores that this process may run on.
#[cfg(target_os = "linux")]
pub(super) fn affinity() -> Option<usize> {
    rustix::thread::sched_getaffinity(None).ok().map(|set| set.count() as usize)
}

/// Cores that this process may run on.
#[cfg(not(target_os = "linux"))]
pub(super) fn affinity() -> Option<usize> {
    None
}

/// Cores' worth of time that the control group grants, where it limits them.
pub(super) fn cgroup_cores() -> Option<f64> {
    let two = limits("", "cpu.max").filter_map(|text| cpu_max(&text));
    let one = dirs("cpu").filter_map(|dir| {
        let read = |name| fs::read_to_string(dir.join(name)).ok();
        cpu_max(&format!("{} {}", read("cpu.cfs_quota_us")?.trim(), read("cpu.cfs_period_us")?.trim()))
    });
    two.chain(one).min_by(f64::total_cmp)
}

/// `150000 100000` (quota and period in microseconds) as 1.5; none if there is no quota.
fn cpu_max(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

/// Bytes of memory that the control group grants, where it limits them.
pub(super) fn cgroup_memory() -> Option<u64> {
    let limits = limits("", "memory.max").chain(limits("memory", "memory.limit_in_bytes"));
    // Version 1 says "no limit" with a number near 2^63.
    limits.filter_map(|text| text.trim().parse().ok()).filter(|&bytes: &u64| bytes < 1 << 60).min()
}

fn limits(controller: &str, file: &'static str) -> impl Iterator<Item = String> {
    dirs(controller).filter_map(move |dir| fs::read_to_string(dir.join(file)).ok())
}

/// The folders of this process's control group and of those around it; `controller` is empty for version 2.
fn dirs(controller: &str) -> impl Iterator<Item = PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = cgroup_of(&groups, controller).unwrap_or_else(|| "/".to_string());
    let root = Path::new("/sys/fs/cgroup").join(controller);
    // In a container the group may be named as the host sees it; its limits then stand at the root.
    let around: Vec<PathBuf> =
        Path::new(&group).ancestors().map(|dir| root.join(dir.strip_prefix("/").unwrap_or(dir))).collect();
    around.into_iter()
}

/// The group of `controller` in `/proc/self/cgroup`, whose lines are `number:controllers:group`.
fn cgroup_of(groups: &str, controller: &str) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, group) = (fields.next()?, fields.next()?);
        controllers.split(',').any(|c| c == controller).then(|| group.to_string())
    })
}

/// Name of the processor.
pub(super) fn cpu_model() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_string())
}

/// Bytes of memory: all, and what new processes can have.
pub(super) fn memory() -> Option<(u64, u64)> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    Some((meminfo(&text, "MemTotal:")?, meminfo(&text, "MemAvailable:")?))
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let kibibytes = text.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix("kB")?;
    Some(1024 * kibibytes.trim().parse::<u64>().ok()?)
}

/// What can be written into a folder.
#[derive(Debug)]
pub(super) struct Room {
    /// The folder, or the nearest one above it that exists: the others would be made.
    pub exists: PathBuf,
    /// Why nothing can be written, if so.
    pub refused: Option<rustix::io::Errno>,
    /// Bytes free to this user.
    pub free: Option<u64>,
}

/// Looks at a folder without writing there.
pub(super) fn room(dir: &Path) -> Room {
    use rustix::fs::{Access, access, statvfs};
    let exists = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/")).to_path_buf();
    let refused = match exists.is_dir() {
        true => access(&exists, Access::WRITE_OK | Access::EXEC_OK).err(),
        false => Some(rustix::io::Errno::NOTDIR),
    };
    let free = statvfs(&exists).ok().map(|stat| stat.f_bavail * stat.f_frsize);
    Room { refused, free, exists }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_lists() {
        for (list, expected) in
            [("0\n", Some(1)), ("0-3\n", Some(4)), ("0-3,8,10-11", Some(7)), ("", None), ("3-0", None), ("a", None)]
        {
            assert_eq!(count_list(list), expected, "{list}");
        }
    }

    #[test]
    fn core_limits() {
        for (text, expected) in [
            ("150000 100000\n", Some(1.5)),
            ("max 100000\n", None),
            ("-1 100000", None),
            ("100000", None),
            ("100000 0", None),
        ] {
            assert_eq!(cpu_max(text), expected, "{text}");
        }
    }

    #[test]
    fn groups_of_both_versions() {
        let groups = "4:memory:/a/b\n2:cpu,cpuacct:/c:d\n0::/user.slice\n";
        assert_eq!(cgroup_of(groups, "memory").as_deref(), Some("/a/b"));
        assert_eq!(cgroup_of(groups, "cpu").as_deref(), Some("/c:d"));
        assert_eq!(cgroup_of(groups, "").as_deref(), Some("/user.slice"));
        assert_eq!(cgroup_of(groups, "pids"), None);
    }

    #[test]
    fn memory_lines() {
        let text = "MemTotal:       24684092 kB\nMemFree: 1 kB\nMemAvailable:   22546332 kB\n";
        assert_eq!(meminfo(text, "MemTotal:"), Some(24684092 * 1024));
        assert_eq!(meminfo(text, "MemAvailable:"), Some(22546332 * 1024));
        assert_eq!(meminfo(text, "Cached:"), None);
    }

    #[test]
    fn a_folder_to_be_made_is_judged_by_the_one_above() {
        let dir = tempfile::tempdir().unwrap();
        let room_there = room(&dir.path().join("a/b"));
        assert_eq!(room_there.exists, dir.path());
        assert_eq!(room_there.refused, None);
        assert!(room_there.free.is_some());
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(room(&file.join("a")).refused, Some(rustix::io::Errno::NOTDIR));
    }
}
