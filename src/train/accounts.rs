//! What the ranks tell each other after every step, so that all of them know the same and decide alike.

use super::Losses;
use crate::collective::{Collective, CollectiveError};
use std::time::Duration;

/// One rank's account of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Account {
    /// It was asked to stop.
    pub stop: bool,
    /// Nothing is being written of an earlier checkpoint.
    pub idle: bool,
    /// Time it spent on the step, but for waiting for others.
    pub busy: Duration,
    /// The part of it in which it waited for images.
    pub loading: Duration,
    /// Of weights and averages, where it is due.
    pub checksum: Option<u64>,
    /// Of its images, in the order of the batch.
    pub losses: Vec<f32>,
    /// Drawn for them.
    pub timesteps: Vec<u32>,
}

const STOP: u32 = 1;
const IDLE: u32 = 2;
const CHECKSUM: u32 = 4;
/// Words before losses and timesteps.
const HEAD: usize = 5;

impl Account {
    /// Takes over what a step gave.
    pub fn fill(&mut self, losses: &Losses<'_>) {
        self.losses.clear();
        self.losses.extend_from_slice(losses.losses);
        self.timesteps.clear();
        self.timesteps.extend_from_slice(losses.timesteps);
    }

    fn encode(&self) -> Vec<u8> {
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(self.stop, STOP) | flag(self.idle, IDLE) | flag(self.checksum.is_some(), CHECKSUM);
        let checksum = self.checksum.unwrap_or(0);
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let head = [flags, micros(self.busy), micros(self.loading), checksum as u32, (checksum >> 32) as u32];
        let losses = self.losses.iter().map(|loss| loss.to_bits());
        let words = head.into_iter().chain(losses).chain(self.timesteps.iter().copied());
        words.flat_map(u32::to_le_bytes).collect()
    }

    /// Nothing if these are not the bytes of an account.
    fn decode(bytes: &[u8]) -> Option<Account> {
        let (words, []) = bytes.as_chunks::<4>() else { return None };
        let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let (head, rest) = words.split_first_chunk::<HEAD>()?;
        if !rest.len().is_multiple_of(2) {
            return None;
        }
        let (losses, timesteps) = rest.split_at(rest.len() / 2);
        Some(Account {
            stop: head[0] & STOP != 0,
            idle: head[0] & IDLE != 0,
            busy: Duration::from_micros(head[1].into()),
            loading: Duration::from_micros(head[2].into()),
            checksum: (head[0] & CHECKSUM != 0).then_some(u64::from(head[3]) | u64::from(head[4]) << 32),
            losses: losses.iter().map(|&bits| f32::from_bits(bits)).collect(),
            timesteps: timesteps.to_vec(),
        })
    }

    /// Those of all ranks, in their order, at every rank.
    pub fn exchange(&self, collective: &mut dyn Collective) -> Result<Vec<Account>, CollectiveError> {
        let all = collective.all_gather(self.encode())?;
        let decoded = |(rank, bytes): (usize, &Vec<u8>)| {
            Account::decode(bytes).ok_or_else(|| CollectiveError::OutOfStep {
                rank,
                ours: "the account of a step".into(),
                theirs: format!("{} bytes that are none", bytes.len()),
            })
        };
        all.iter().enumerate().map(decoded).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_is_read_as_it_was_written() {
        let account = Account {
            stop: true,
            idle: false,
            busy: Duration::from_micros(123_456),
            loading: Duration::from_micros(1_234),
            checksum: Some(0x0123_4567_89ab_cdef),
            losses: vec![0.5, f32::NAN, -0.0],
            timesteps: vec![0, 999, 17],
        };
        let back = Account::decode(&account.encode()).unwrap();
        assert!(back.losses.iter().zip(&account.losses).all(|(a, b)| a.to_bits() == b.to_bits()));
        assert_eq!(Account { losses: vec![], ..back }, Account { losses: vec![], ..account });
        let idle = Account { idle: true, ..Account::default() };
        assert_eq!(Account::decode(&idle.encode()).unwrap(), idle);
        for bytes in [0, 3, 16, 21, 24] {
            assert!(Account::decode(&vec![0; bytes]).is_none(), "{bytes} bytes");
        }
    }
}
