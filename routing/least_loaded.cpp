// The plan of least_loaded.py, move for move: see there for what it does and why. Here is only what makes it fast: plain
// arrays, and quotas written where they belong.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace {

using Count = int64_t;
constexpr Count exact = Count(1) << 44;  // up to here Python and C++ round alike
using Pair = std::pair<Count, Count>;  // (rows, who); ties go to the lowest

struct Task {
    Count ranks, experts;
    const Count *home_E;
    const uint8_t *held_RE;  // null where no expert has a copy
    const Count *node_R;     // 0, 1, ...
    Count chunk;
};

struct Spill {
    const Task &task;
    const std::vector<Count> &load_E;
    Count *quota_RE;
    std::vector<Count> room_R, total_of, visits_R;
    std::vector<std::vector<Pair>> rooms_of;  // of each node, (room, rank), ascending

    Spill(const Task &task, const std::vector<Count> &load_E, std::vector<Count> room, Count *quota_RE)
        : task(task), load_E(load_E), quota_RE(quota_RE), room_R(std::move(room)), visits_R(task.ranks) {
        Count nodes = 1 + *std::max_element(task.node_R, task.node_R + task.ranks);
        total_of.resize(nodes);
        rooms_of.resize(nodes);
        for (Count rank = 0; rank < task.ranks; rank++)
            if (room_R[rank] >= task.chunk) {
                rooms_of[task.node_R[rank]].emplace_back(room_R[rank], rank);
                total_of[task.node_R[rank]] += room_R[rank];
            }
        for (auto &rooms : rooms_of) std::sort(rooms.begin(), rooms.end());
    }

    void run() {
        std::vector<Count> lenders;
        for (Count rank = 0; rank < task.ranks; rank++)
            if (-room_R[rank] >= task.chunk) lenders.push_back(rank);
        std::stable_sort(lenders.begin(), lenders.end(), [&](Count a, Count b) { return room_R[a] < room_R[b]; });
        std::vector<Count> place_R(task.ranks, -1);
        for (size_t i = 0; i < lenders.size(); i++) place_R[lenders[i]] = i;
        std::vector<std::vector<Pair>> left(lenders.size());  // (-rows still here, expert)
        for (Count expert = 0; expert < task.experts; expert++)
            if (Count place = place_R[task.home_E[expert]]; place >= 0) left[place].emplace_back(-load_E[expert], expert);
        if (task.held_RE)
            for (size_t i = 0; i < lenders.size(); i++) to_copies(lenders[i], left[i]);
        for (auto &heap : left) std::make_heap(heap.begin(), heap.end(), std::greater<>());
        for (bool anybody : {false, true})
            for (size_t i = 0; i < lenders.size(); i++) export_(lenders[i], left[i], anybody);
    }

    void export_(Count lender, std::vector<Pair> &left, bool anybody) {
        for (Count excess; (excess = -room_R[lender]) >= task.chunk;) {
            auto [minus, expert] = left.front();
            Count wanted = std::min(-minus, excess);
            Pair found = anybody ? of_anybody(lender, wanted) : best_fit(task.node_R[lender], -1, wanted);
            if (found.first == 0) return;
            move(expert, lender, found.second, found.first);
            std::pop_heap(left.begin(), left.end(), std::greater<>());
            left.back() = {minus + found.first, expert};
            std::push_heap(left.begin(), left.end(), std::greater<>());
        }
    }

    void to_copies(Count lender, std::vector<Pair> &left) {
        for (auto &[minus, expert] : left)
            for (Count rank = 0; rank < task.ranks; rank++) {
                if (rank == lender || !task.held_RE[rank * task.experts + expert]) continue;
                Count rows = std::min({-room_R[lender], -minus, room_R[rank]});
                if (rows <= 0) continue;
                move(expert, lender, rank, rows);
                minus += rows;
            }
    }

    // (rows, borrower); 0 rows: nobody. Of one node, or of all but one.
    Pair best_fit(Count node, Count except, Count rows) {
        const Pair *fit = nullptr;
        Pair most{0, -1};
        for (Count each = node < 0 ? 0 : node; each < (node < 0 ? Count(rooms_of.size()) : node + 1); each++) {
            auto &rooms = rooms_of[each];
            if (each == except || rooms.empty()) continue;
            if (rooms.back().first >= rows) {
                const Pair *found = &*std::lower_bound(rooms.begin(), rooms.end(), Pair{rows, -1});
                if (!fit || *found < *fit) fit = found;
            } else {
                most = std::max(most, rooms.back());
            }
        }
        if (fit) return {rows, fit->second};
        if (most.first < task.chunk) return {0, -1};
        return {rows - most.first < task.chunk ? rows : most.first, most.second};
    }

    Pair of_anybody(Count lender, Count rows) {
        Count home = task.node_R[lender], roomiest = -1;
        for (Count node = 0; node < Count(total_of.size()); node++)
            if (node != home && (roomiest < 0 || total_of[node] > total_of[roomiest])) roomiest = node;
        if (roomiest >= 0) {
            Pair found = best_fit(roomiest, -1, rows);
            if (found.first == 0) found = best_fit(-1, home, rows);
            if (found.first) return found;
        }
        Count taker = -1, any = 0;
        for (Count rank = 0; rank < task.ranks; rank++) {
            if (room_R[rank] > room_R[any]) any = rank;
            if (room_R[rank] > 0 && task.node_R[rank] == home && (taker < 0 || room_R[rank] > room_R[taker])) taker = rank;
        }
        if (taker < 0) taker = any;
        return {rows <= room_R[taker] + task.chunk ? rows : task.chunk, taker};
    }

    void move(Count expert, Count lender, Count borrower, Count rows) {
        Count *there = quota_RE + borrower * task.experts + expert;
        if (*there == 0 && !(task.held_RE && task.held_RE[borrower * task.experts + expert]))
            visits_R[lender]++, visits_R[borrower]++;
        *there += rows;
        quota_RE[lender * task.experts + expert] -= rows;
        take(borrower, rows);
        room_R[lender] += rows;
    }

    void take(Count rank, Count rows) {
        Count node = task.node_R[rank];
        auto &rooms = rooms_of[node];
        if (room_R[rank] >= task.chunk) {
            rooms.erase(std::lower_bound(rooms.begin(), rooms.end(), Pair{room_R[rank], rank}));
            total_of[node] -= room_R[rank];
        }
        room_R[rank] -= rows;
        if (room_R[rank] >= task.chunk) {
            Pair now{room_R[rank], rank};
            rooms.insert(std::lower_bound(rooms.begin(), rooms.end(), now), now);
            total_of[node] += room_R[rank];
        }
    }
};

}  // namespace

extern "C" {

// quota_RE is all zero. -> 0; 1 where the tables are none that a plan can be made of, and quota_RE is as it was
Count evenmoe_least_loaded(const Count *count_RE, Count ranks, Count experts, const Count *home_E, const uint8_t *held_RE,
                         const Count *node_R, Count chunk, double headroom, double worth, Count *quota_RE) {
    std::vector<Count> load_E(experts), room_R(ranks);
    Count least = 0, total = 0;
    for (Count rank = 0; rank < ranks; rank++)
        for (Count expert = 0; expert < experts; expert++) {
            Count rows = count_RE[rank * experts + expert];
            load_E[expert] += rows;
            least = std::min(least, rows);
        }
    for (Count rows : load_E) total += rows;
    double most = std::ceil(headroom * double(total) / double(ranks));
    if (least < 0 || total > exact || most > double(exact)) return 1;
    Count capacity = Count(most), peak = 0;
    for (Count expert = 0; expert < experts; expert++) {
        room_R[home_E[expert]] += load_E[expert];
        quota_RE[home_E[expert] * experts + expert] = load_E[expert];
    }
    for (Count &room : room_R) peak = std::max(peak, room), room = capacity - room;
    if (peak - capacity < chunk) return 0;
    Task task{ranks, experts, home_E, held_RE, node_R, chunk};
    Spill spill(task, load_E, room_R, quota_RE);
    spill.run();
    Count relief = peak - capacity + *std::min_element(spill.room_R.begin(), spill.room_R.end());
    Count visits = *std::max_element(spill.visits_R.begin(), spill.visits_R.end());
    if (!(double(relief) > worth * double(visits))) {
        std::memset(quota_RE, 0, sizeof(Count) * ranks * experts);
        for (Count expert = 0; expert < experts; expert++) quota_RE[home_E[expert] * experts + expert] = load_E[expert];
    }
    return 0;
}

// -> 0 where the law of an Assignment holds
Count evenmoe_unlawful(const Count *count_RE, const Count *quota_RE, Count ranks, Count experts) {
    std::vector<Count> lost_E(experts);
    Count wrong = 0;
    for (Count rank = 0; rank < ranks; rank++)
        for (Count expert = 0; expert < experts; expert++) {
            Count routed = count_RE[rank * experts + expert], computed = quota_RE[rank * experts + expert];
            lost_E[expert] += routed - computed;
            wrong |= std::min(routed, computed) < 0;
        }
    for (Count lost : lost_E) wrong |= lost != 0;
    return wrong;
}
}
