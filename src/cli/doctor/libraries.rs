//! Shared libraries, looked for where the system's loader does and not loaded: a broken driver must not break `doctor`.

use std::env::consts::ARCH;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Folders with shared libraries.
pub(super) struct Places {
    /// Where the loader looks, in its order.
    loader: Vec<PathBuf>,
    /// Where CUDA libraries often lie unseen by the loader.
    others: Vec<PathBuf>,
}

/// What became of the search for a library.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Search {
    /// The loader will find it here.
    Found(PathBuf),
    /// It is here, where the loader does not look.
    Unseen(PathBuf),
    /// The loader will find this, which is no library of this machine, for the reason given.
    Unusable(PathBuf, String),
    /// It is nowhere.
    Absent,
}

impl Places {
    /// The loader's folders, from the environment and the system's configuration.
    pub(super) fn new() -> Places {
        let var = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let mut loader: Vec<PathBuf> = var("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths).collect();
        configured(Path::new("/etc/ld.so.conf"), 0, &mut loader);
        let defaults = ["/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib"].map(PathBuf::from);
        let multiarch = ["/lib", "/usr/lib"].map(|dir| PathBuf::from(format!("{dir}/{ARCH}-linux-gnu")));
        loader.extend(multiarch.into_iter().chain(defaults));

        let mut others = Vec::new();
        for root in ["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|name| var(name)).map(PathBuf::from) {
            others.extend([root.join("lib64"), root.join("lib")]);
        }
        for dir in ["/usr/local/cuda/lib64", "/opt/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/lib/wsl/lib"] {
            others.push(dir.into());
        }
        Places { loader, others }
    }

    /// Number of folders that are searched.
    pub(super) fn count(&self) -> usize {
        self.loader.len() + self.others.len()
    }

    /// Looks for the first of `names` that is there.
    pub(super) fn find(&self, names: &[&str]) -> Search {
        let mut unusable = None;
        for (dirs, seen) in [(&self.loader, true), (&self.others, false)] {
            for path in names.iter().flat_map(|name| dirs.iter().map(move |dir| dir.join(name))) {
                // A dangling link is as good as nothing to the loader, but worth a word.
                if fs::symlink_metadata(&path).is_err() {
                    continue;
                }
                match usable(&path) {
                    Ok(()) if seen => return Search::Found(path),
                    Ok(()) => return Search::Unseen(path),
                    // The loader gives up at a file that is no library, and passes over one for another machine.
                    Err(Fault { why, ends: true }) if seen => return Search::Unusable(path, why),
                    Err(Fault { why, .. }) => {
                        unusable.get_or_insert(Search::Unusable(path, why));
                    }
                }
            }
        }
        unusable.unwrap_or(Search::Absent)
    }
}

/// Adds the folders that the loader's configuration `file` names, those of included files with them.
fn configured(file: &Path, depth: usize, dirs: &mut Vec<PathBuf>) {
    let Ok(text) = fs::read_to_string(file) else { return };
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        if let Some(pattern) = line.strip_prefix("include").map(str::trim) {
            // Included files may include others; a circle ends somewhere.
            if depth < 4 {
                included(file, pattern).iter().for_each(|path| configured(path, depth + 1, dirs));
            }
        } else if line.starts_with('/') {
            dirs.push(line.into());
        }
    }
}

/// The files that `pattern` means in `file`: a path whose last part may hold one `*`.
fn included(file: &Path, pattern: &str) -> Vec<PathBuf> {
    let path = file.parent().unwrap_or(Path::new("/")).join(pattern);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return vec![];
    };
    let Some((start, end)) = name.split_once('*') else { return vec![path] };
    let Ok(entries) = fs::read_dir(dir) else { return vec![] };
    let fits = |name: &str| name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end);
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut paths: Vec<PathBuf> = names.filter(|name| fits(name)).map(|name| dir.join(name)).collect();
    paths.sort();
    paths
}

/// Why a file cannot be loaded.
struct Fault {
    why: String,
    /// Whether the loader stops at it in place of looking on.
    ends: bool,
}

/// Whether a file is a 64-bit ELF file for this processor.
fn usable(path: &Path) -> Result<(), Fault> {
    let fault = |why: String, ends| Err(Fault { why, ends });
    let mut header = [0u8; 20];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut header));
    match read {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            fault("the file is empty or cut off".into(), true)
        }
        Err(error) => fault(error.to_string(), false),
        Ok(()) if !header.starts_with(b"\x7fELF") => fault("it is not a shared library".into(), true),
        Ok(()) if header[4] != 2 => fault("it is not a 64-bit library".into(), false),
        Ok(()) => {
            let machine = u16::from_le_bytes([header[18], header[19]]);
            let expected = match ARCH {
                "x86_64" => 62,
                "aarch64" => 183,
                _ => machine,
            };
            if machine == expected { Ok(()) } else { fault(format!("it is for another processor than {ARCH}"), false) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of this machine's kind.
    fn library() -> Vec<u8> {
        let exe = std::env::current_exe().unwrap();
        fs::read(exe).unwrap()[..64].to_vec()
    }

    #[test]
    fn libraries_are_found_in_the_loaders_order() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
        for dir in [&a, &b, &c] {
            fs::create_dir(dir).unwrap();
        }
        let places = Places { loader: vec![a.clone(), b.clone()], others: vec![c.clone()] };
        assert_eq!(places.find(&["libx.so.1"]), Search::Absent);
        fs::write(c.join("libx.so.1"), library()).unwrap();
        assert_eq!(places.find(&["libx.so.1"]), Search::Unseen(c.join("libx.so.1")));
        fs::write(b.join("libx.so.1"), library()).unwrap();
        assert_eq!(places.find(&["libx.so.2", "libx.so.1"]), Search::Found(b.join("libx.so.1")));
        fs::write(a.join("libx.so.2"), library()).unwrap();
        assert_eq!(places.find(&["libx.so.2", "libx.so.1"]), Search::Found(a.join("libx.so.2")));
    }

    #[test]
    fn the_loader_passes_over_other_machines_and_stops_at_rubbish() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
        for dir in [&a, &b] {
            fs::create_dir(dir).unwrap();
        }
        let places = Places { loader: vec![a.clone(), b.clone()], others: vec![] };
        fs::write(b.join("libx.so.1"), library()).unwrap();
        let mut other = library();
        other[18] ^= 1;
        fs::write(a.join("libx.so.1"), other).unwrap();
        assert_eq!(places.find(&["libx.so.1"]), Search::Found(b.join("libx.so.1")));
        fs::write(a.join("libx.so.1"), "").unwrap();
        assert!(matches!(places.find(&["libx.so.1"]), Search::Unusable(path, _) if path == a.join("libx.so.1")));
    }

    #[test]
    fn what_is_not_a_library_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { loader: vec![dir.path().into()], others: vec![] };
        let path = dir.path().join("libx.so.1");
        let mut other = library();
        other[18] ^= 1;
        for (content, expected) in [
            (vec![], "empty"),
            (b"#!/bin/sh\nexit 0 # not a library".to_vec(), "not a shared"),
            (other, "another processor"),
        ] {
            fs::write(&path, content).unwrap();
            let Search::Unusable(found, why) = places.find(&["libx.so.1"]) else { panic!("{expected}") };
            assert!(found == path && why.contains(expected), "{why}");
        }
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("nowhere", &path).unwrap();
        assert!(matches!(places.find(&["libx.so.1"]), Search::Unusable(..)));
    }

    #[test]
    fn configuration_files_include_others() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("ld.so.conf");
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(&conf, "# all\ninclude d/*.conf\n/last # of all\n").unwrap();
        fs::write(dir.path().join("d/b.conf"), "/b\n").unwrap();
        fs::write(dir.path().join("d/a.conf"), "/a1\n\n/a2\ninclude ../ld.so.conf\n").unwrap();
        fs::write(dir.path().join("d/c.other"), "/c\n").unwrap();
        let mut dirs = Vec::new();
        configured(&conf, 3, &mut dirs);
        assert_eq!(dirs, ["/a1", "/a2", "/b", "/last"].map(PathBuf::from));
        // A circle of includes ends.
        configured(&conf, 0, &mut dirs);
    }
}
