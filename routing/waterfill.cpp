// The level of waterfill.py, move for move: see there for what it does and why.
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

using Count = int64_t;

struct Level {
    // The copies on each rank, the rank of each copy, the other copies of its expert: first those on its node.
    const Count *start_R, *copies, *rank_C, *start_C, *far_C, *other;
    Count ranks, *rows_C, *room_R, peak;

    Count lower() {
        std::vector<Count> over;
        for (Count rank = 0; rank < ranks; rank++)
            if (room_R[rank] < 0) over.push_back(rank);
        for (bool far : {false, true})
            for (Count rank : over) give(rank, far);
        for (Count rank : over)
            while (room_R[rank] < 0) pass_on(rank);
        return peak;
    }

    void give(Count rank, bool far) {
        for (Count i = start_R[rank]; i < start_R[rank + 1]; i++) {
            Count copy = copies[i], end = far ? start_C[copy + 1] : far_C[copy];
            for (Count j = far ? far_C[copy] : start_C[copy]; j < end; j++) {
                Count &room = room_R[rank_C[other[j]]], rows = std::min({-room_R[rank], rows_C[copy], room});
                if (rows <= 0) continue;
                rows_C[copy] -= rows, rows_C[other[j]] += rows;
                room_R[rank] += rows, room -= rows;
            }
        }
    }

    void pass_on(Count rank) {
        std::vector<std::pair<Count, Count>> came(ranks, {-1, -1});
        std::vector<Count> queue{rank};
        for (size_t i = 0; i < queue.size(); i++)
            for (Count c = start_R[queue[i]]; c < start_R[queue[i] + 1]; c++) {
                Count copy = copies[c];
                if (!rows_C[copy]) continue;
                for (Count j = start_C[copy]; j < start_C[copy + 1]; j++) {
                    Count taker = rank_C[other[j]];
                    if (taker == rank || came[taker].first >= 0) continue;
                    came[taker] = {copy, other[j]};
                    if (room_R[taker] > 0 && !filled(taker, rank, came)) return;
                    queue.push_back(taker);
                }
            }
        Count sum = 0, many = queue.size();
        for (Count reached : queue) sum += room_R[reached];
        Count rise = (-sum + many - 1) / many;  // the rank is over, and nobody who was reached has room
        peak += rise;
        for (Count each = 0; each < ranks; each++) room_R[each] += rise;
    }

    bool filled(Count taker, Count rank, const std::vector<std::pair<Count, Count>> &came) {
        Count room = room_R[taker], most = -room_R[rank];
        for (Count at = taker; at != rank; at = rank_C[came[at].first]) most = std::min(most, rows_C[came[at].first]);
        Count rows = std::min(room, most);
        for (Count at = taker; at != rank; at = rank_C[came[at].first])
            rows_C[came[at].first] -= rows, rows_C[came[at].second] += rows;
        room_R[rank] += rows, room_R[taker] -= rows;
        return room < most;
    }
};

}  // namespace

// links: the six tables of Level, one after the other. -> the peak
extern "C" Count evenmoe_level(const Count *links, Count ranks, Count copies, Count *rows_C, Count *room_R, Count peak) {
    const Count *on = links + ranks + 1, *rank_C = on + copies, *start_C = rank_C + copies, *far_C = start_C + copies + 1;
    return Level{links, on, rank_C, start_C, far_C, far_C + copies, ranks, rows_C, room_R, peak}.lower();
}
