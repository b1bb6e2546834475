//! Random numbers and choices that follow from a seed.

use std::collections::BTreeMap;

/// SplitMix64: small, and the same everywhere.
pub(super) struct Random(u64);

impl Random {
    /// The numbers of stream `stream` of a seed.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed);
        Self(random.next() ^ stream.wrapping_mul(0xd134_2543_de82_ef95))
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not zero.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// In [0, 1).
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// `wanted` of `count` things, spread over all of them: the things are cut into `wanted` equal parts,
/// and one is taken from each. All of them where they do not suffice.
pub(super) fn spread(count: usize, wanted: usize, seed: u64) -> Vec<usize> {
    if count <= wanted {
        return (0..count).collect();
    }
    let mut random = Random::new(seed, 0);
    let edge = |i: usize| (i as u128 * count as u128 / wanted as u128) as usize;
    (0..wanted).map(|i| edge(i) + random.below((edge(i + 1) - edge(i)) as u64) as usize).collect()
}

/// Keeps a random choice of the things that pass by: those with the least of random numbers, as many
/// as have `budget` bytes together.
pub(super) struct Reservoir<T> {
    budget: usize,
    seed: u64,
    passed: u64,
    bytes: usize,
    /// By random number and place.
    kept: BTreeMap<(u64, u64), (usize, T)>,
}

impl<T> Reservoir<T> {
    pub(super) fn new(budget: usize, seed: u64) -> Self {
        Self { budget, seed, passed: 0, bytes: 0, kept: BTreeMap::new() }
    }

    pub(super) fn push(&mut self, bytes: usize, thing: T) {
        let place = self.passed;
        self.passed += 1;
        let number = Random::new(self.seed, place).next();
        self.bytes += bytes;
        self.kept.insert((number, place), (bytes, thing));
        while let Some(last) = self.kept.last_entry() {
            let bytes = last.get().0;
            if self.bytes - bytes < self.budget {
                return;
            }
            last.remove();
            self.bytes -= bytes;
        }
    }

    /// What was kept, in the order in which it passed.
    pub(super) fn into_kept(self) -> Vec<T> {
        let mut kept: Vec<_> = self.kept.into_iter().map(|((_, at), (_, t))| (at, t)).collect();
        kept.sort_unstable_by_key(|(place, _)| *place);
        kept.into_iter().map(|(_, thing)| thing).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_takes_one_of_each_part() {
        for (count, wanted) in [(10, 3), (100, 100), (101, 100), (7, 9), (1000, 1)] {
            let chosen = spread(count, wanted, 5);
            assert_eq!(chosen.len(), wanted.min(count));
            for (i, &at) in chosen.iter().enumerate() {
                let parts = wanted.min(count);
                assert!((i * count / parts..(i + 1) * count / parts).contains(&at));
            }
        }
        assert_ne!(spread(1000, 4, 1), spread(1000, 4, 2));
        assert_eq!(spread(1000, 4, 1), spread(1000, 4, 1));
    }

    #[test]
    fn a_reservoir_keeps_its_budget_and_favours_nothing() {
        let mut kept_first = 0;
        for seed in 0..400 {
            let mut reservoir = Reservoir::new(50, seed);
            (0..100).for_each(|i| reservoir.push(10, i));
            let kept = reservoir.into_kept();
            assert_eq!(kept.len(), 5);
            assert!(kept.is_sorted());
            kept_first += kept.iter().filter(|&&i| i < 50).count();
        }
        // 2000 draws: 1000 of the first half, give or take five standard deviations.
        assert!((890..1110).contains(&kept_first), "{kept_first}");

        let mut reservoir = Reservoir::new(1000, 0);
        (0..3).for_each(|i| reservoir.push(10, i));
        assert_eq!(reservoir.into_kept(), [0, 1, 2], "too little is kept whole");
    }
}
