//! What a GPU waits for in a step, one after another, as it was begun.

use super::super::Exchange;
use crate::device::cuda::{At, BeaconPlace};

/// The waits of a step, in order. A CUDA graph has those with which it was captured.
#[derive(Debug, Default)]
pub(super) struct Waits {
    all: Vec<Exchange>,
    is_new: bool,
}

impl Waits {
    /// A step begins, whose waits are those of the one before, unless others are noted.
    pub fn begin(&mut self) {
        self.is_new = true;
    }

    /// The next wait is begun.
    pub fn note(&mut self, exchange: Exchange) {
        if std::mem::take(&mut self.is_new) {
            self.all.clear();
        }
        self.all.push(exchange);
    }

    /// What a GPU does that is at this place.
    pub fn name(&self, BeaconPlace { step, at }: BeaconPlace) -> String {
        let (number, verb) = match at {
            At::End => return format!("step {step}"),
            At::Computes(0) => return format!("what it computes before the sums of step {step}"),
            At::Computes(number) => (number - 1, "what it computes after "),
            At::Waits(number) => (number, ""),
        };
        let is_sum = self.all.get(number).is_none_or(|exchange| exchange.is_sum());
        let bucket = self.all.iter().take(number).filter(|before| before.is_sum() == is_sum).count();
        let noun = if is_sum { "sum" } else { "gather" };
        format!("{verb}the {noun} of bucket {bucket} of step {step}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_named_by_its_bucket() {
        let mut waits = Waits::default();
        let said = |waits: &Waits, at| waits.name(BeaconPlace { step: 812, at });
        for exchange in [Exchange::AllReduce; 2] {
            waits.note(exchange);
        }
        assert_eq!(said(&waits, At::Waits(1)), "the sum of bucket 1 of step 812");
        waits.begin();
        assert_eq!(said(&waits, At::Waits(1)), "the sum of bucket 1 of step 812", "a graph notes none");
        for exchange in [Exchange::ReduceScatter, Exchange::AllGather].repeat(2) {
            waits.note(exchange);
        }
        assert_eq!(said(&waits, At::Waits(3)), "the gather of bucket 1 of step 812");
        assert_eq!(said(&waits, At::Computes(0)), "what it computes before the sums of step 812");
        assert_eq!(said(&waits, At::Computes(3)), "what it computes after the sum of bucket 1 of step 812");
        assert_eq!(said(&waits, At::End), "step 812");
    }
}
