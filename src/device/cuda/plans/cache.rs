//! Plans on disk: a file for each GPU and its libraries in the user's cache, so that a search is made once.
//!
//! Several processes may write a file, each whenever it has found a plan: it reads what is there, adds all that it has found itself, and puts
//! a whole file in its place. Where two do so at a time, the later one takes its place; the other adds what it had found again with its next
//! plan, and what two have found last at one time is searched again some day.

use super::table::{Card, PlanTable};
use crate::device::cuda::CudaError;
use crate::files::{Durability, open_regular, parent, user_cache_dir, write};
use std::ffi::OsString;
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

/// The environment variable that says where plans are kept.
pub(super) const VARIABLE: &str = "DDPM_DIST_CUDA_PLANS";

/// A file beyond this is none of ours: one plan has about 400 bytes.
const MOST_BYTES: u64 = 64 << 20;

/// The file for a GPU and its libraries, if plans are kept.
#[derive(Debug)]
pub(super) struct PlanCache(Option<PathBuf>);

impl PlanCache {
    /// As the environment says.
    ///
    /// # Errors
    /// It says something that is neither `off` nor an absolute path.
    pub fn of(card: &Card) -> Result<PlanCache, CudaError> {
        let folder = match std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            None => user_cache_dir().map(|folder| folder.join("plans")),
            Some(value) if value == "off" => None,
            Some(value) if Path::new(&value).is_absolute() => Some(value.into()),
            Some(value) => return Err(CudaError::UnknownPlanSetting(value.to_string_lossy().into_owned())),
        };
        Ok(PlanCache(folder.map(|folder| folder.join(file_name(card)))))
    }

    /// What is there for this card, and a notice if what is there is of no use.
    pub fn read(&self, card: &Card) -> (PlanTable, Option<String>) {
        let nothing = || PlanTable::new(card.clone());
        let Some(path) = &self.0 else { return (nothing(), None) };
        let bytes = match read_at_most(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return (nothing(), None),
            Err(error) => {
                let notice = format!("the plans of a GPU in {} cannot be read: {error}", path.display());
                return (nothing(), Some(notice));
            }
        };
        let why = match PlanTable::decode(&bytes) {
            Ok(table) if table.card == *card => return (table, None),
            Ok(table) => format!("is for {}, and this is {card}", table.card),
            Err(why) => format!("is damaged ({why})"),
        };
        (nothing(), Some(set_aside(path, &why)))
    }

    /// Adds plans to those that are there. What stands in the way is a notice.
    pub fn add(&self, found: &PlanTable, durability: Durability) -> Option<String> {
        let path = self.0.as_ref()?;
        let (mut table, notice) = self.read(&found.card);
        found.choices().iter().for_each(|timed| table.put(timed.clone()));
        let written = fs::create_dir_all(parent(path))
            .and_then(|()| table.encode().map_err(io::Error::other))
            .and_then(|text| write(path, text.as_bytes(), durability));
        let failure = written.err().map(|error| {
            format!(
                "the plans of a GPU cannot be kept in {}, so that the next run searches them again: {error}; \
                 {VARIABLE} names another folder, or is off",
                path.display()
            )
        });
        failure.or(notice)
    }
}

/// `NVIDIA-H200-9.0-cudnn-9.10.2-cublaslt-13.0.1.jsonl`
fn file_name(card: &Card) -> String {
    let Card { gpu, capability: (major, minor), cudnn, cublaslt } = card;
    let plain = |text: &str| -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        text.chars().take(80).map(plain).collect()
    };
    format!("{}-{major}.{minor}-cudnn-{}-cublaslt-{}.jsonl", plain(gpu), plain(cudnn), plain(cublaslt))
}

fn read_at_most(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(MOST_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Moves a file out of the way, and says so.
fn set_aside(path: &Path, why: &str) -> String {
    let mut name = OsString::from(path);
    name.push(".set-aside");
    let what = format!("{}, which has plans of a GPU, {why}", path.display());
    match fs::rename(path, &name) {
        Ok(()) => format!("{what}: it is now {}, and plans are searched again", Path::new(&name).display()),
        Err(error) => format!("{what}, and cannot be set aside ({error}): plans are searched again"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{card, timed};
    use super::*;

    fn table(choices: &[(usize, i64)]) -> PlanTable {
        let mut table = PlanTable::new(card());
        choices.iter().for_each(|&(images, engine)| table.put(timed(images, engine)));
        table
    }

    fn cache_in(folder: &Path) -> PlanCache {
        PlanCache(Some(folder.join("plans").join(file_name(&card()))))
    }

    #[test]
    fn what_several_write_is_merged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache_in(folder.path());
        assert_eq!(cache.read(&card()), (table(&[]), None));
        assert_eq!(cache.add(&table(&[(1, 4), (2, 4)]), Durability::Kill), None);
        assert_eq!(cache_in(folder.path()).add(&table(&[(2, 6), (3, 8)]), Durability::PowerFailure), None);
        assert_eq!(cache.read(&card()), (table(&[(1, 4), (2, 6), (3, 8)]), None));
        assert_eq!(fs::read_dir(folder.path().join("plans")).unwrap().count(), 1, "nothing else is left there");
        let nowhere = PlanCache(None);
        assert_eq!(
            (nowhere.add(&table(&[(1, 4)]), Durability::Kill), nowhere.read(&card())),
            (None, (table(&[]), None))
        );
    }

    #[test]
    fn a_damaged_and_a_foreign_file_are_set_aside_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache_in(folder.path());
        let path = cache.0.clone().unwrap();
        fs::create_dir_all(parent(&path)).unwrap();
        let mut foreign = table(&[(1, 4)]);
        foreign.card.cudnn = "9.8.0".into();
        for (bytes, says) in [
            (b"\xff\xfe nonsense".to_vec(), "is damaged (line 1: "),
            (
                foreign.encode().unwrap().into_bytes(),
                "is for NVIDIA H200 (9.0) with cuDNN 9.8.0 and cuBLASLt 13.0.1, and this is",
            ),
        ] {
            fs::write(&path, &bytes).unwrap();
            let (found, notice) = cache.read(&card());
            let notice = notice.unwrap();
            assert!(notice.contains(says) && notice.contains(".set-aside"), "{notice}");
            assert_eq!(found, table(&[]));
            assert_eq!(fs::read(path.with_extension("jsonl.set-aside")).unwrap(), bytes);
            assert_eq!(cache.read(&card()), (table(&[]), None));
        }
    }

    #[test]
    fn where_nothing_can_be_written_there_is_a_notice() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("plans"), "a file").unwrap();
        let notice = cache_in(folder.path()).add(&table(&[(1, 4)]), Durability::Kill).unwrap();
        assert!(notice.contains("cannot be kept in") && notice.contains(VARIABLE), "{notice}");
        // What should be a file and is a folder is neither read nor moved.
        let folder = tempfile::tempdir().unwrap();
        let cache = cache_in(folder.path());
        fs::create_dir_all(cache.0.as_ref().unwrap()).unwrap();
        let (found, notice) = cache.read(&card());
        assert!(notice.unwrap().contains("it is a folder, not a regular file"));
        assert_eq!(found, table(&[]));
    }
}
