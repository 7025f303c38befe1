// How the gradients of the closed form and of its state begin: with the coordinates of the rows.
#pragma once

#include "sm90_radius.cuh"
#include "sm90_team.cuh"

namespace aniso::sm90 {

// y from the tile, and of the blocks of the rank that this block collects the coordinates, with the cells of their radius maps on their way.
// The gradient's tile comes after that of y. Then the places of the parts are free. meanwhile() comes while parts are on their way.
template <typename Mates, typename S, int kColumns, int kChunks, int kOwnGroups, typename Meanwhile>
__device__ __forceinline__ void collect_coordinates(Mates& team, const Sm90Operands<S>& in, const Coordinates<kColumns>& coordinates,
                                                    const CUtensorMap& grad_map, uint32_t (&y)[kChunks][16], float (&own)[kOwnGroups][4],
                                                    uint32_t (&cells)[kOwnGroups][2], const Meanwhile& meanwhile) {
  const auto& exchange = team.exchange;
  wait_phase(team.loaded(), 0);
  team.project_and_send(y, own, [](uint32_t pair) { return pair; }, [&] {
    team.load_after_reading(grad_map, team.tile, Mates::kReuse);
    team.wait_for_last_tile(0);
  });
  team.forget_addresses();
  meanwhile();
  wait_phase(exchange.projected(), 0);
  if (team.leader) exchange.template expect_parts<true>();
  exchange.add_parts(own);
  const auto column_of = [&](int32_t g) { return team.column_of(g); };
  const bool added = ask_for_cells(in, coordinates, int32_t(cluster_rank()) * Mates::Shares::kOwnColumns, column_of, own, cells);
  if (added) exchange.warp_is_done();  // with the parts
}

}  // namespace aniso::sm90
