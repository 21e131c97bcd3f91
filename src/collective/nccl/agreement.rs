//! What the ranks tell each other before their GPUs meet.

use super::super::host::Host;
use super::super::{Collective, CollectiveError};
use crate::device::cuda::nccl::{self, Communicator, ID_BYTES};
use serde::{Deserialize, Serialize};

/// What the ranks do.
pub(super) enum Agreed {
    /// They meet under this name.
    Join([u8; ID_BYTES]),
    /// Not all can, and why.
    Apart(String),
}

/// What a rank says: its version of the library, or why it has none; and rank 0 the name, where it has one.
#[derive(Debug, Serialize, Deserialize)]
struct Word {
    version: Result<String, String>,
    id: Vec<u8>,
}

impl Word {
    fn of_this_rank(rank: usize) -> Word {
        let version = nccl::version().map_err(|error| error.to_string());
        let id = match &version {
            Ok(_) if rank == 0 => Communicator::new_id().map(Vec::from).map_err(|error| error.to_string()),
            _ => Ok(Vec::new()),
        };
        match id {
            Ok(id) => Word { version, id },
            Err(reason) => Word { version: Err(reason), id: Vec::new() },
        }
    }
}

/// Agrees with the other ranks, which all come to the same.
pub(super) fn agree(host: &mut Host) -> Result<Agreed, CollectiveError> {
    let rank = host.rank();
    let mine = serde_json::to_vec(&Word::of_this_rank(rank)).unwrap_or_default();
    let all = host.all_gather(mine)?;
    let read = |(rank, bytes): (usize, &Vec<u8>)| {
        serde_json::from_slice(bytes).map_err(|error| CollectiveError::OutOfStep {
            rank,
            ours: "its version of NCCL".into(),
            theirs: error.to_string(),
        })
    };
    Ok(judge(&all.iter().enumerate().map(read).collect::<Result<Vec<Word>, _>>()?))
}

fn judge(words: &[Word]) -> Agreed {
    let mut versions = Vec::new();
    for (rank, word) in words.iter().enumerate() {
        match &word.version {
            Ok(version) => versions.push(version),
            Err(reason) => return Agreed::Apart(format!("rank {rank} says {reason}")),
        }
    }
    if let Some(rank) = versions.iter().position(|version| *version != versions[0]) {
        let [zero, other] = [versions[0], versions[rank]];
        return Agreed::Apart(format!("rank 0 has NCCL {zero}, rank {rank} {other}: install one version for all"));
    }
    match words[0].id.clone().try_into() {
        Ok(id) => Agreed::Join(id),
        Err(_) => Agreed::Apart("rank 0 gives no name to meet under".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(version: Result<&str, &str>, id: usize) -> Word {
        Word { version: version.map(str::to_owned).map_err(str::to_owned), id: vec![7; id] }
    }

    fn apart(words: &[Word]) -> String {
        match judge(words) {
            Agreed::Apart(reason) => reason,
            Agreed::Join(_) => panic!("they join"),
        }
    }

    #[test]
    fn gpus_join_where_all_ranks_have_one_version() {
        let [zero, other] = [word(Ok("2.28.9"), ID_BYTES), word(Ok("2.28.9"), 0)];
        assert!(matches!(judge(&[zero, other]), Agreed::Join(id) if id == [7; ID_BYTES]));
        let without = apart(&[word(Ok("2.28.9"), ID_BYTES), word(Err("there is none"), 0)]);
        assert_eq!(without, "rank 1 says there is none");
        let mixed = apart(&[word(Ok("2.28.9"), ID_BYTES), word(Ok("2.28.9"), 0), word(Ok("2.27.3"), 0)]);
        assert!(mixed.starts_with("rank 0 has NCCL 2.28.9, rank 2 2.27.3"), "{mixed}");
        assert!(apart(&[word(Ok("2.28.9"), 5)]).contains("no name"));
    }
}
